//! If the allocator refuses memory, the core returns an error, whichever request that
//! was. (If it requested memory in a way that cannot fail, Rust would abort this test.)

#![allow(clippy::cast_possible_truncation)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Debug;
use std::io::Cursor;
use std::ptr;

use pg_prewarm_blocks::{
    Age, BlockList, CarriedBuilder, ListReader, ListWriter, Plan, PlanError, ReadError, Record,
    UsageCount, WriteError,
};

/// The system's allocator, which can refuse one of a thread's requests.
struct Refusing;

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

thread_local! {
    /// Which request is refused: 1 is the next one, 0 means none.
    static REFUSED: Cell<u32> = const { Cell::new(0) };
}

// SAFETY: `alloc` returns what the system's allocator does, or null, which means no
// memory. The trait's own `realloc` calls `alloc`, so nothing else has to be refused.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let number = REFUSED.get();
        REFUSED.set(number.saturating_sub(1));
        match number {
            1 => ptr::null_mut(),
            // SAFETY: the caller passes a layout of non-zero size.
            _ => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: `alloc` got the memory from the system's allocator, with this layout.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Runs the operation with its first request refused, then with its second refused, and
/// so on, until it makes no such request. It must make at least `least` requests.
fn refuse_each_request<I, T, E: Debug>(
    least: u32,
    input: impl Fn() -> I,
    operation: impl Fn(I) -> Result<T, E>,
    is_out_of_memory: impl Fn(&E) -> bool,
) {
    for number in 1.. {
        let input = input();
        REFUSED.set(number);
        let result = operation(input);
        let was_refused = REFUSED.replace(0) == 0;
        match result {
            Ok(_) if !was_refused => {
                assert!(number > least, "{} requests", number - 1);
                return;
            }
            Ok(_) => panic!("request {number} was refused without an error"),
            Err(error) => assert!(was_refused && is_out_of_memory(&error), "{error:?}"),
        }
    }
}

/// Blocks of many files, each with a usage count.
fn records() -> impl Iterator<Item = (Record, UsageCount)> {
    (0..4000).map(|number| {
        let record = Record {
            database: number % 3,
            tablespace: 1663,
            filenumber: 1 + number / 3,
            fork: 0,
            block: number,
        };
        (record, UsageCount::new(number % 6))
    })
}

fn write(out: &mut [u8], expected: usize) -> Result<u64, WriteError> {
    let mut writer = ListWriter::begin(Cursor::new(out), expected)?;
    for (record, usage_count) in records() {
        writer.push(&record, usage_count)?;
    }
    Ok(writer.finish()?.0)
}

fn text() -> Vec<u8> {
    let mut text = vec![b'\n'; 200_000];
    write(&mut text, 4000).unwrap();
    text.truncate(text.trim_ascii_end().len() + 1);
    text
}

#[test]
fn reading_a_list_into_memory_returns_an_error_if_memory_is_refused() {
    let text = text();
    // With the header, and without it: then the length of the list is not known.
    for text in [&text[..], &text[1..]] {
        let read = || BlockList::read(text, text.len() as u64);
        assert_eq!(read().unwrap().entries.len(), 4000);
        refuse_each_request(
            10,
            || (),
            |()| read(),
            |error| matches!(error, ReadError::OutOfMemory(_)),
        );
    }
}

#[test]
fn reading_a_list_record_by_record_returns_an_error_if_memory_is_refused() {
    let text = text();
    let read = || {
        let mut count = 0;
        for record in ListReader::new(|at| &text[at as usize..])? {
            record?;
            count += 1;
        }
        Ok(count)
    };
    assert_eq!(read().unwrap(), 4000);
    refuse_each_request(
        5,
        || (),
        |()| read(),
        |error| matches!(error, ReadError::OutOfMemory(_)),
    );
}

#[test]
fn planning_returns_an_error_if_memory_is_refused() {
    let text = text();
    refuse_each_request(
        8,
        || BlockList::read(&text[..], text.len() as u64).unwrap(),
        |list| {
            let cached = records().map(|(record, _)| record).step_by(7);
            Plan::new(list, cached, |_| 3000)
        },
        |error| matches!(error, PlanError::OutOfMemory(_)),
    );
}

#[test]
fn making_a_plan_smaller_returns_an_error_if_memory_is_refused() {
    let text = text();
    refuse_each_request(
        1,
        || {
            let list = BlockList::read(&text[..], text.len() as u64).unwrap();
            Plan::new(list, std::iter::empty(), |_| 4000).unwrap()
        },
        |mut plan| plan.shrink(1000),
        |_| true,
    );
}

#[test]
fn writing_a_list_returns_an_error_if_memory_is_refused() {
    // As many records as expected, and more.
    for expected in [4000, 1000] {
        refuse_each_request(
            4,
            || vec![0; 200_000],
            |mut out| write(&mut out, expected),
            |error| matches!(error, WriteError::OutOfMemory(_)),
        );
    }
}

#[test]
fn records_that_are_carried() {
    let text = text();
    let carry = || {
        let mut builder = CarriedBuilder::new(true);
        for (record, usage_count) in records() {
            builder.add(record, usage_count, Age::Cached)?;
        }
        builder.add_list(ListReader::new(|at| &text[at as usize..])?, false)?;
        let mut carried = builder.finish(3000);
        for (record, _) in records().step_by(7) {
            carried.found(&record);
        }
        Ok(carried.left())
    };
    refuse_each_request(
        10,
        || (),
        |()| carry(),
        |error| matches!(error, ReadError::OutOfMemory(_)),
    );
}
