//! Reading an upstream server's list of any bytes.

use pg_prewarm_blocks::{BlockList, UpstreamList, UpstreamListBuilder};

use super::memory;

/// How much memory reading may take: so much for each byte of the list, and so much
/// besides.
const MEMORY_FOR_A_BYTE: usize = 128;
const MEMORY_BESIDE: usize = 64 * 1024;

const CHECKSUM: &[u8] = b"crc32c 0x";
const BYTES: &[u8] = b"\nbytes ";

/// Takes the input as a list, whose length and checksum are corrected if its first byte is
/// odd: the fuzzer would never find them.
pub fn check(input: &[u8]) {
    let [first, list @ ..] = input else { return };
    let mut list = list.to_vec();
    if first % 2 == 1 {
        correct(&mut list);
    }
    let announced = UpstreamList::announced(&list);
    let limit = MEMORY_FOR_A_BYTE * list.len() + MEMORY_BESIDE;
    let Ok(read) = memory::within(limit, || UpstreamList::read(&list)) else {
        return;
    };
    // Blocks may take more bytes than any server writes for them.
    if let Ok(announced) = announced {
        let announced = announced.unwrap();
        assert_eq!(announced.length, list.len() as u64);
        assert_eq!(announced.origin, read.origin);
    }
    let (origin, blocks, hot) = (read.origin, read.blocks(), read.hot_blocks());
    let read = BlockList::from(read);
    assert_eq!(read.entries.len() as u64, blocks);

    // A list that is written and read again is the same.
    let mut builder = UpstreamListBuilder::default();
    for (record, usage_count) in read.records() {
        builder.push(&record, usage_count).unwrap();
    }
    let bytes = builder.finish(&origin, &mut || ()).unwrap();
    let mut again = UpstreamList::read(&bytes).unwrap();
    assert_eq!(
        (again.origin, again.blocks(), again.hot_blocks()),
        (origin, blocks, hot)
    );
    for (record, usage_count) in read.records() {
        assert_eq!(again.usage_count(&record), Some(usage_count));
    }
}

fn correct(list: &mut Vec<u8>) {
    let find = |list: &[u8], text: &[u8]| list.windows(text.len()).position(|at| at == text);
    let Some(end) = find(list, b"\n\n").map(|at| at + 2) else {
        return;
    };
    if let Some(at) = find(&list[..end], BYTES).map(|at| at + BYTES.len())
        && let Some(length) = list[at..end].iter().position(|&byte| byte == b'\n')
    {
        let bytes = (list.len() - end).to_string();
        list.splice(at..at + length, bytes.bytes());
    }
    let Some(end) = find(list, b"\n\n").map(|at| at + 2) else {
        return;
    };
    if let Some(line) = find(&list[..end], CHECKSUM) {
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&list[..line]), &list[end..]);
        let text = format!("{checksum:08x}\n\n");
        list.splice(line + CHECKSUM.len()..end, text.bytes());
    }
}
