//! The trailer of a block list: the blocks' usage counts.
//!
//! ```text
//! # pg_prewarm 2.0
//! # usage counts
//! 5102…                       one digit for each record, at most 120 in a line
//! # carried 123 45            if records are carried: how many of each age
//! # crc32c 0x12345678         of every byte before this line
//! ```
//!
//! The records that are carried are the last ones: here 123 that were left once, and
//! then 45 that were left twice. A version that does not know the line ignores the
//! trailer.
//!
//! It follows the last record. Contrib's module does not read it. All of the trailer is
//! ignored if it is truncated, if it does not match the records, or if the checksum
//! does not match (the list may be edited).

use std::collections::TryReserveError;
use std::io::Write;

use crate::CarriedCounts;

/// The lines before the digits.
pub(super) const FIRST_LINES: [&str; 2] = ["# pg_prewarm 2.0", "# usage counts"];

/// The beginning of the line about carried records; two numbers follow.
pub(super) const CARRIED: &str = "# carried ";

/// The beginning of the last line; eight hexadecimal digits follow.
pub(super) const CHECKSUM: &str = "# crc32c 0x";

/// The most digits in a line.
pub(super) const DIGITS_PER_LINE: usize = 120;

/// Why a trailer is ignored that has an invalid usage count, or not one for each record.
pub(super) const MISMATCH: &str = "the usage counts do not match the records";

/// Why a trailer is ignored with an invalid line about carried records, or another after it.
pub(super) const INVALID_LINE: &str = "the trailer has an invalid line";

/// Why a trailer is ignored by which more records are carried than there are.
pub(super) const TOO_MANY_CARRIED: &str = "there are fewer records than carried ones";

/// Where the usage counts of a list's records come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UsageCounts {
    /// The list has no trailer: contrib's module wrote it, or it is empty.
    #[default]
    Missing,
    /// The trailer has them.
    Saved,
    /// The trailer is ignored for that reason.
    Ignored(&'static str),
}

/// Reads a trailer, line by line, from the bytes after the records.
#[derive(Debug, Default)]
pub(super) struct TrailerReader {
    line: Vec<u8>,
    /// How many of [`FIRST_LINES`] have been read.
    lines: usize,
    /// How many digits have been read, and the bytes before the line of the first.
    digits: u64,
    before_digits: u64,
    /// How many records are carried, once it was told.
    carried: Option<CarriedCounts>,
    outcome: Option<UsageCounts>,
}

impl TrailerReader {
    /// Reads the next bytes. `checksum` is that of all bytes before them, and is updated.
    /// `usage_count` gets the number of each record and its digit, and returns false if
    /// there is no such record or the digit is invalid.
    pub fn read(
        &mut self,
        bytes: &[u8],
        checksum: &mut u32,
        mut usage_count: impl FnMut(u64, u8) -> bool,
    ) -> Result<(), TryReserveError> {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            if self.outcome.is_some() {
                break;
            }
            // The digits, and a line break of one or two bytes.
            if self.line.len() + piece.len() > DIGITS_PER_LINE + 2 {
                self.ignore("the trailer has a line that is too long");
                break;
            }
            self.line.try_reserve(piece.len())?;
            self.line.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                self.line(*checksum, &mut usage_count);
                *checksum = crc32c::crc32c_append(*checksum, &self.line);
                if self.digits == 0 {
                    self.before_digits += self.line.len() as u64;
                }
                self.line.clear();
            }
        }
        Ok(())
    }

    /// Whether the following bytes do not belong to the trailer.
    pub fn has_ended(&self) -> bool {
        self.outcome.is_some()
    }

    /// How many bytes were read before the line of the first digit.
    pub fn before_digits(&self) -> u64 {
        self.before_digits
    }

    /// Whether the usage counts can be used for a list of that many records, and how many
    /// of these are carried.
    pub fn finish(mut self, checksum: u32, records: u64) -> (UsageCounts, CarriedCounts) {
        // The last line need not end with a line break.
        if self.outcome.is_none() && !self.line.is_empty() {
            self.line(checksum, &mut |_, _| false);
        }
        let carried = self.carried.unwrap_or_default();
        let outcome = match self.outcome {
            None if self.lines == 0 => UsageCounts::Missing,
            None => UsageCounts::Ignored("the trailer is truncated"),
            Some(UsageCounts::Saved) if self.digits != records => UsageCounts::Ignored(MISMATCH),
            Some(UsageCounts::Saved) if carried.total() > records => {
                UsageCounts::Ignored(TOO_MANY_CARRIED)
            }
            Some(outcome) => outcome,
        };
        match outcome {
            UsageCounts::Saved => (outcome, carried),
            _ => (outcome, CarriedCounts::default()),
        }
    }

    fn ignore(&mut self, reason: &'static str) {
        // Without the first line, it is not a trailer.
        self.outcome = Some(if self.lines == 0 {
            UsageCounts::Missing
        } else {
            UsageCounts::Ignored(reason)
        });
    }

    fn line(&mut self, checksum: u32, usage_count: &mut impl FnMut(u64, u8) -> bool) {
        let line = std::mem::take(&mut self.line);
        if let Err(reason) = self.parse(line.trim_ascii_end(), checksum, usage_count) {
            self.ignore(reason);
        }
        self.line = line;
    }

    fn parse(
        &mut self,
        line: &[u8],
        checksum: u32,
        usage_count: &mut impl FnMut(u64, u8) -> bool,
    ) -> Result<(), &'static str> {
        if let Some(expected) = FIRST_LINES.get(self.lines) {
            if line == expected.as_bytes() {
                self.lines += 1;
            } else if self.lines > 0 || !line.is_empty() {
                return Err("the trailer has no line \"# usage counts\"");
            }
        } else if let Some(digits) = line.strip_prefix(CHECKSUM.as_bytes()) {
            let mut expected = [0; 8];
            write!(&mut expected[..], "{checksum:08x}").expect("32 bits have eight digits");
            if digits != expected {
                return Err("the checksum does not match");
            }
            self.outcome = Some(UsageCounts::Saved);
        } else if let Some(counts) = line.strip_prefix(CARRIED.as_bytes())
            && self.carried.is_none()
        {
            let counts = parse_carried(counts).ok_or(INVALID_LINE)?;
            self.carried = Some(counts);
        } else if self.carried.is_some() {
            return Err(INVALID_LINE);
        } else {
            for &digit in line {
                if !usage_count(self.digits, digit) {
                    return Err(MISMATCH);
                }
                self.digits += 1;
            }
        }
        Ok(())
    }
}

/// The two numbers of the line about carried records.
fn parse_carried(text: &[u8]) -> Option<CarriedCounts> {
    let (once, twice) = std::str::from_utf8(text).ok()?.split_once(' ')?;
    let number = |text: &str| {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_digit());
        is_plain.then(|| text.parse().ok()).flatten()
    };
    Some(CarriedCounts {
        once: number(once)?,
        twice: number(twice)?,
    })
}
