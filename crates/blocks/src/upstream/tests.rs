use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const ORIGIN: Origin = Origin {
    system_identifier: 7_438_492_746_502_938_471,
    timeline: 3,
    time: 814_000_000_000_000,
    block_size: 8192,
};

fn record(filenumber: u32, block: u32) -> Record {
    Record {
        database: 5,
        tablespace: 1663,
        filenumber,
        fork: 0,
        block,
    }
}

fn bytes_of(blocks: &[(Record, u32)]) -> Vec<u8> {
    let mut builder = UpstreamListBuilder::default();
    for (record, usage_count) in blocks {
        builder.push(record, UsageCount::new(*usage_count)).unwrap();
    }
    builder.finish(&ORIGIN, &mut || ()).unwrap()
}

/// A list with a right header and checksum, and this body.
fn with_body(blocks: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = header(&ORIGIN, blocks, body).unwrap();
    bytes.extend_from_slice(body);
    bytes
}

fn error_of(bytes: &[u8]) -> String {
    match UpstreamList::read(bytes) {
        Ok(_) => panic!("it was read"),
        Err(error) => error.to_string(),
    }
}

proptest! {
    #[test]
    fn what_was_written_is_read(
        blocks in prop::collection::vec((0..3u32, 0..4u32, prop_oneof![0..300u32, any::<u32>()], 0..6u32), 0..300)
    ) {
        let mut expected = BTreeMap::new();
        let mut pushed = Vec::new();
        for (database, filenumber, block, usage_count) in blocks {
            let record = Record { database, ..record(filenumber + 1, block.min(u32::MAX - 1)) };
            pushed.push((record, usage_count));
            let known = expected.entry(record).or_insert(usage_count);
            *known = (*known).max(usage_count);
        }
        let bytes = bytes_of(&pushed);
        let announced = Announced { origin: ORIGIN, length: bytes.len() as u64 };
        prop_assert_eq!(UpstreamList::announced(&bytes).unwrap(), Some(announced));
        let mut list = UpstreamList::read(&bytes).unwrap();
        prop_assert_eq!(list.origin, ORIGIN);
        prop_assert_eq!(list.blocks(), expected.len() as u64);
        prop_assert_eq!(list.hot_blocks(), expected.values().filter(|&&count| count >= 2).count() as u64);
        for (record, usage_count) in &expected {
            prop_assert_eq!(list.usage_count(record).map(UsageCount::get), Some(*usage_count));
        }
        prop_assert_eq!(list.usage_count(&record(77, 1)), None);
        let list = BlockList::from(list);
        let read: BTreeMap<_, _> = list.records().map(|(record, count)| (record, count.get())).collect();
        prop_assert_eq!(read, expected);
    }

    #[test]
    fn a_list_that_was_altered_or_cut_short_is_refused(
        at in any::<prop::sample::Index>(), bit in 0..8u32, length in any::<prop::sample::Index>()
    ) {
        let bytes = bytes_of(&[(record(1, 7), 3), (record(1, 9), 0), (record(2, 0), 5)]);
        let mut altered = bytes.clone();
        altered[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(UpstreamList::read(&altered).is_err());
        let cut = &bytes[..length.index(bytes.len())];
        prop_assert!(UpstreamList::read(cut).is_err());
        let mut longer = bytes.clone();
        longer.push(0);
        prop_assert!(UpstreamList::read(&longer).is_err());
    }

    #[test]
    fn any_body_is_read_or_refused(blocks in 0..20u64, body in prop::collection::vec(any::<u8>(), 0..60)) {
        let bytes = with_body(blocks, &body);
        if let Ok(list) = UpstreamList::read(&bytes) {
            prop_assert_eq!(list.blocks(), blocks);
        }
    }
}

#[test]
fn a_block_of_a_dense_table_takes_a_byte() {
    let blocks: Vec<_> = (0..1000).map(|block| (record(1, block), 5)).collect();
    let bytes = bytes_of(&blocks);
    assert!(bytes.len() < 1000 + 250, "{}", bytes.len());
}

#[test]
fn an_error_tells_what_is_wrong() {
    let bytes = bytes_of(&[(record(1, 7), 3)]);
    assert_eq!(error_of(b""), "it is incomplete");
    assert_eq!(error_of(&bytes[..40]), "it is incomplete");
    assert_eq!(error_of(&bytes[..bytes.len() - 1]), "it is incomplete");
    assert_eq!(
        error_of(b"<<1>>\n1,2,3,4,5\n"),
        "its format is not supported"
    );
    let text = String::from_utf8_lossy(&bytes).replacen("list 1", "list 2", 1);
    assert_eq!(error_of(text.as_bytes()), "its format is not supported");
    let mut altered = bytes.clone();
    *altered.last_mut().unwrap() ^= 1;
    assert_eq!(error_of(&altered), "its checksum does not match");
}

#[test]
fn records_that_no_server_writes_are_refused() {
    let file = [5, 10, 1, 0];
    let body = |rest: &[u8]| [&file, rest].concat();
    assert!(UpstreamList::read(&with_body(1, &body(&[1, 0]))).is_ok());
    for (blocks, body, why) in [
        (0, body(&[0]), "a file without blocks"),
        (1, body(&[2, 0]), "fewer blocks than the file says"),
        (2, body(&[1, 0]), "fewer blocks than the header says"),
        (0, body(&[1, 0]), "more blocks than the header says"),
        (1, body(&[1, 6]), "usage count 6"),
        (2, [body(&[1, 0]), body(&[1, 8])].concat(), "a file twice"),
        (u64::MAX, body(&[1, 0]), "more blocks than bytes"),
        (
            1,
            body(&[1, 0xf8, 0xff, 0xff, 0xff, 0x7f]),
            "the block number that is none",
        ),
        (1, vec![0xff; 30], "an integer without an end"),
    ] {
        assert_eq!(
            error_of(&with_body(blocks, &body)),
            "it has an invalid record",
            "{why}"
        );
    }
}

#[test]
fn origin_and_length_are_known_from_the_beginning() {
    let bytes = bytes_of(&[(record(1, 7), 3)]);
    assert!(matches!(UpstreamList::announced(&bytes[..20]), Ok(None)));
    let announced = UpstreamList::announced(&bytes[..bytes.len() - 2]).unwrap();
    let length = bytes.len() as u64;
    assert_eq!(
        announced,
        Some(Announced {
            origin: ORIGIN,
            length
        })
    );
    assert!(UpstreamList::announced(&[b'x'; 600]).is_err());
    assert!(UpstreamList::announced(b"something else\n\n").is_err());
}

#[test]
fn no_list_has_more_blocks_or_bytes_than_a_server_can_cache() {
    let bytes = String::from_utf8(bytes_of(&[])).unwrap();
    let with = |blocks: u64, bytes_after: u64| {
        let text = bytes.replace("blocks 0", &format!("blocks {blocks}"));
        let text = text.replace("bytes 0", &format!("bytes {bytes_after}"));
        UpstreamList::announced(text.as_bytes()).is_ok()
    };
    assert!(with(0, 0) && with(1 << 30, 1 << 32));
    assert!(!with((1 << 30) + 1, 1 << 32));
    assert!(!with(1000, 60_001) && !with(0, 1) && !with(u64::MAX, u64::MAX));
}
