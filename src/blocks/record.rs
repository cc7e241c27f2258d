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
    pub database: Oid,
    pub tablespace: Oid,
    /// The relation's file number (`relfilenode`), not its OID.
    pub filenumber: Oid,
    /// A fork's number, legal or not; see [`Fork`].
    pub fork: u32,
    pub block: BlockNumber,
}

/// One of a relation's files, numbered as PostgreSQL's `ForkNumber`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fork {
    Main = 0,
    FreeSpaceMap = 1,
    VisibilityMap = 2,
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
}
