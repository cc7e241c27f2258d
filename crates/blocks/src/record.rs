//! One line of a block list, and the types of what it names.

/// An object identifier: of a database, of a tablespace, or a relation's file
/// number. 0 is no object (a database of 0: a shared catalog).
pub type Oid = u32;

/// A block's number within its fork, counted from 0.
pub type BlockNumber = u32;

/// One block that was cached, as its buffer's tag names it.
///
/// What a record says is only a claim: the file may have been edited, and the
/// relation may have changed since. Fields stand in the order of the file, which
/// is also the order that blocks are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    /// The database's OID; 0 for a shared catalog.
    pub database: Oid,
    /// The tablespace's OID.
    pub tablespace: Oid,
    /// The relation's file number (`relfilenode`), not its OID.
    pub filenumber: Oid,
    /// A fork's number, legal or not; see [`Fork`].
    pub fork: u32,
    /// The block's number within the fork.
    pub block: BlockNumber,
}

impl Record {
    /// Whether there can be such a block. No relation has file number 0: it marks those
    /// of mapped catalogs.
    pub(crate) fn is_legal(&self) -> bool {
        self.block != INVALID_BLOCK
            && self.filenumber != 0
            && Fork::from_number(self.fork).is_some()
    }
}

/// The number that PostgreSQL reserves for "no block".
const INVALID_BLOCK: BlockNumber = BlockNumber::MAX;

/// One of a relation's files, numbered as PostgreSQL's `ForkNumber`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// What the relation holds.
    Main = 0,
    /// How much space is free in each block of the main fork.
    FreeSpaceMap = 1,
    /// Which blocks of the main fork hold only rows that all can see.
    VisibilityMap = 2,
    /// What the main fork of an unlogged relation is replaced by after a crash.
    Init = 3,
}

impl Fork {
    /// The fork of that number, where there is one.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Main),
            1 => Some(Self::FreeSpaceMap),
            2 => Some(Self::VisibilityMap),
            3 => Some(Self::Init),
            _ => None,
        }
    }

    /// What SQL calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::FreeSpaceMap => "fsm",
            Self::VisibilityMap => "vm",
            Self::Init => "init",
        }
    }
}

/// How hot a block is: its buffer's usage count when it was dumped, 0 to 5. The
/// server counts a buffer's uses up to 5, and takes one away each time it passes
/// by in search of a buffer to evict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsageCount(u8);

impl UsageCount {
    /// The hottest.
    pub const MAX: Self = Self(5);

    /// How many usage_counts there are.
    pub const COUNT: usize = Self::MAX.0 as usize + 1;

    /// That of a block that was read once, which is taken where none is known.
    pub const ONCE: Self = Self(1);

    /// The usage count of that usage count; the hottest, for a higher one.
    pub fn new(count: u32) -> Self {
        Self(count.min(u32::from(Self::MAX.0)) as u8)
    }

    /// The usage count that a decimal digit stands for in the file.
    pub fn from_digit(digit: u8) -> Option<Self> {
        match digit {
            b'0'..=b'5' => Some(Self(digit - b'0')),
            _ => None,
        }
    }

    /// The digit that stands for it.
    pub fn digit(self) -> u8 {
        b'0' + self.0
    }

    /// The usage count that it stands for.
    pub fn get(self) -> u32 {
        self.0.into()
    }
}

/// How long a record has been in the list without its block being loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Age {
    /// The block was cached when the list was written.
    Cached = 0,
    /// The block was left once: when the server started, or by a load on demand.
    Once = 1,
    /// The block was left by a second start.
    Twice = 2,
}

impl Age {
    /// How many ages there are.
    pub(crate) const COUNT: usize = 3;

    /// The ages of records that a list carries, in its order.
    pub const CARRIED: [Self; 2] = [Self::Once, Self::Twice];

    /// The age of that number; the highest, for a higher one.
    pub(crate) fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Cached,
            1 => Self::Once,
            _ => Self::Twice,
        }
    }

    /// The age of a record that a load has left. `None` if it is not carried any more:
    /// it has been carried over two starts. A load on demand makes no record older.
    pub fn when_left(self, is_start: bool) -> Option<Self> {
        match (self, is_start) {
            (Self::Cached, _) | (Self::Once, false) => Some(Self::Once),
            (Self::Once, true) | (Self::Twice, false) => Some(Self::Twice),
            (Self::Twice, true) => None,
        }
    }
}

/// How many records a list carries, by age. They stand after all others, those of
/// [`Age::Once`] first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CarriedCounts {
    /// Records of [`Age::Once`].
    pub once: u64,
    /// Records of [`Age::Twice`].
    pub twice: u64,
}

impl CarriedCounts {
    /// All records that are carried.
    pub fn total(self) -> u64 {
        self.once.saturating_add(self.twice)
    }

    /// The age of a record, counted from 0, in a list of so many.
    pub(crate) fn age_of(self, record: u64, records: u64) -> Age {
        // Counted from the end: 1 for the last.
        let place = records.saturating_sub(record);
        if place <= self.twice {
            Age::Twice
        } else if place <= self.total() {
            Age::Once
        } else {
            Age::Cached
        }
    }
}
