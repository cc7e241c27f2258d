//! A record, which is one line of a block list, and the types of its fields.

/// The OID of a database or a tablespace, or a relation's file number. 0 is invalid,
/// except as the database of shared catalogs.
pub type Oid = u32;

/// A block's number within its fork, starting at 0.
pub type BlockNumber = u32;

/// One block that was cached: the fields of its buffer's tag.
///
/// A record is only a claim: the file may have been edited, and the relation may have
/// changed since. The fields have the order of the file, by which records are sorted
/// as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Record {
    /// The database's OID; 0 for a shared catalog.
    pub database: Oid,
    /// The tablespace's OID.
    pub tablespace: Oid,
    /// The relation's file number (`relfilenode`), not its OID.
    pub filenumber: Oid,
    /// A fork number, which may be invalid; see [`Fork`].
    pub fork: u32,
    /// The block number within the fork.
    pub block: BlockNumber,
}

impl Record {
    /// Whether there can be such a block. `relfilenode` is 0 for mapped catalogs, but no
    /// file has that number.
    pub(crate) fn is_legal(&self) -> bool {
        self.block != INVALID_BLOCK
            && self.filenumber != 0
            && Fork::from_number(self.fork).is_some()
    }
}

/// PostgreSQL's `InvalidBlockNumber`.
const INVALID_BLOCK: BlockNumber = BlockNumber::MAX;

/// A fork of a relation, numbered like PostgreSQL's `ForkNumber`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    /// The relation's data.
    Main = 0,
    /// The free space in each block of the main fork.
    FreeSpaceMap = 1,
    /// Which blocks of the main fork have only rows that are visible to all.
    VisibilityMap = 2,
    /// Replaces the main fork of an unlogged relation after a crash.
    Init = 3,
}

impl Fork {
    /// The fork with that number. `None` if there is no such fork.
    pub fn from_number(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Main),
            1 => Some(Self::FreeSpaceMap),
            2 => Some(Self::VisibilityMap),
            3 => Some(Self::Init),
            _ => None,
        }
    }

    /// The fork's name in SQL.
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::FreeSpaceMap => "fsm",
            Self::VisibilityMap => "vm",
            Self::Init => "init",
        }
    }
}

/// The usage count of a block's buffer at the time of the dump, 0 to 5. The server
/// increments it, up to 5, when the buffer is used, and decrements it when the clock
/// hand passes the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UsageCount(u8);

impl UsageCount {
    /// The highest usage count.
    pub const MAX: Self = Self(5);

    /// The number of different usage counts.
    pub const COUNT: usize = Self::MAX.0 as usize + 1;

    /// The usage count of a block that was read once, and of a block whose usage count
    /// is not known.
    pub const ONCE: Self = Self(1);

    /// From this usage count on a block is hot: it was used again after it had been read.
    pub const HOT: Self = Self(2);

    /// The usage count `count`, or [`Self::MAX`] if `count` is higher.
    pub fn new(count: u32) -> Self {
        Self(u8::try_from(count).map_or(Self::MAX.0, |count| count.min(Self::MAX.0)))
    }

    /// The usage count of a decimal digit in the file. `None` if the byte is not a digit
    /// from 0 to 5.
    pub fn from_digit(digit: u8) -> Option<Self> {
        match digit {
            b'0'..=b'5' => Some(Self(digit - b'0')),
            _ => None,
        }
    }

    /// Its digit in the file.
    pub fn digit(self) -> u8 {
        b'0' + self.0
    }

    /// Its number.
    pub const fn get(self) -> u32 {
        self.0 as u32
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
