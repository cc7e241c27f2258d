//! Sorting the blocks of a very large list, which calls back now and then.
//!
//! A terabyte of buffers has 134 million blocks, which the standard library sorts in ten
//! seconds. A server process must not be unresponsive for so long. So they are
//! distributed by their most significant bytes, in place, until few enough are left
//! together to be sorted in a moment.

/// How many elements are handled between two callbacks: a few milliseconds' worth.
const AT_ONCE: usize = 1 << 16;

const BITS: u32 = 8;
const BUCKETS: usize = 1 << BITS;

/// Sorts by the number that `bits` makes of an element, and calls `tick` now and then.
pub(crate) fn sort<T: Copy>(elements: &mut [T], bits: impl Fn(T) -> u64, tick: &mut dyn FnMut()) {
    sort_from(elements, &bits, u64::BITS - BITS, tick);
}

/// Sorts elements that differ in the byte at `shift` and in those below it only.
fn sort_from<T: Copy>(
    elements: &mut [T],
    bits: &impl Fn(T) -> u64,
    shift: u32,
    tick: &mut dyn FnMut(),
) {
    tick();
    if elements.len() <= AT_ONCE {
        elements.sort_unstable_by_key(|&element| bits(element));
        return;
    }
    let bucket_of = |element: T| usize::from((bits(element) >> shift).to_le_bytes()[0]);
    let mut counts = [0; BUCKETS];
    for elements in elements.chunks(AT_ONCE) {
        for &element in elements {
            counts[bucket_of(element)] += 1;
        }
        tick();
    }
    distribute(elements, bucket_of, &counts, tick);
    let Some(next_shift) = shift.checked_sub(BITS) else {
        return;
    };
    let mut rest = elements;
    for count in counts.into_iter().filter(|&count| count > 0) {
        let (bucket, others) = rest.split_at_mut(count);
        sort_from(bucket, bits, next_shift, tick);
        rest = others;
    }
}

/// Moves each element to its bucket; the buckets follow one another.
fn distribute<T: Copy>(
    elements: &mut [T],
    bucket_of: impl Fn(T) -> usize,
    counts: &[usize; BUCKETS],
    tick: &mut dyn FnMut(),
) {
    // Where the next element of each bucket belongs, and where the bucket ends.
    let mut next = [0; BUCKETS];
    let mut end = [0; BUCKETS];
    let mut start = 0;
    for bucket in 0..BUCKETS {
        next[bucket] = start;
        start += counts[bucket];
        end[bucket] = start;
    }
    let mut moved = 0;
    for bucket in 0..BUCKETS {
        while next[bucket] < end[bucket] {
            let of = bucket_of(elements[next[bucket]]);
            if of != bucket {
                elements.swap(next[bucket], next[of]);
            }
            next[of] += 1;
            moved += 1;
            if moved % AT_ONCE == 0 {
                tick();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are the same each time and look random.
    fn numbers(count: usize) -> Vec<u64> {
        let mut state = 88_172_645_463_325_252_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn it_sorts_as_the_standard_library_does() {
        const COUNT: usize = 5 * AT_ONCE + 7;
        let of = |mask: u64| numbers(COUNT).into_iter().map(move |number| number & mask);
        for mut elements in [
            vec![],
            vec![2, 1],
            of(u64::MAX).collect(),
            // Many that are equal, in all or in some bytes.
            of(0).collect(),
            of(0xff).collect(),
            of(0xff00_0000_0000_0000).collect(),
            of(0x00ff_0000_00ff_0700).collect(),
            (0..COUNT as u64).collect::<Vec<_>>(),
            (0..COUNT as u64).rev().collect(),
        ] {
            let mut expected = elements.clone();
            expected.sort_unstable();
            sort(&mut elements, |element| element, &mut || ());
            assert!(elements == expected);
        }
    }

    #[test]
    fn it_calls_back_before_many_elements_are_handled() {
        const COUNT: usize = 20 * AT_ONCE;
        let mut ticks = 0;
        sort(&mut numbers(COUNT), |element| element, &mut || ticks += 1);
        assert!(ticks >= 2 * COUNT / AT_ONCE, "{ticks}");
    }
}
