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
//! then 45 that were left twice. A reader that does not know the line leaves the trailer
//! aside.
//!
//! It stands after the last record, where contrib does not look. One that is cut
//! short, does not match the records, or whose checksum differs (somebody edited
//! the list, which is allowed) is left aside as a whole.

use std::collections::TryReserveError;
use std::io::Write;

use crate::CarriedCounts;

/// What a trailer begins with, and what stands before the digits.
pub(super) const FIRST_LINES: [&str; 2] = ["# pg_prewarm 2.0", "# usage counts"];

/// What the line about carried records begins with; two numbers follow.
pub(super) const CARRIED: &str = "# carried ";

/// What the last line begins with; eight hexadecimal digits follow.
pub(super) const CHECKSUM: &str = "# crc32c 0x";

/// The most digits of a line.
pub(super) const DIGITS_PER_LINE: usize = 120;

/// Why a trailer of another list is left aside.
pub(super) const NOT_ONE_EACH: &str = "it has not one digit for each record";

const TOO_MANY_CARRIED: &str = "it has more carried records than there are";

/// Where the usage count of a list's records comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UsageCounts {
    /// The list has no trailer: contrib wrote it, or there is nothing to say.
    #[default]
    Missing,
    /// The trailer's, which fits.
    Saved,
    /// The trailer does not fit, and was left aside for that reason.
    Ignored(&'static str),
}

/// Reads a trailer, line by line, from what follows the records.
#[derive(Debug, Default)]
pub(super) struct TrailerReader {
    line: Vec<u8>,
    lines: usize,
    /// The digits so far, and the bytes before the line of the first.
    digits: u64,
    before_digits: u64,
    /// How many records are carried, once it was told.
    carried: Option<CarriedCounts>,
    outcome: Option<UsageCounts>,
}

impl TrailerReader {
    /// Takes the next bytes; `checksum` is that of every byte before them, and is
    /// kept up. `usage count` is told each record's digit, and whether it has one.
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
            // No line of a trailer is longer.
            if self.line.len() + piece.len() > DIGITS_PER_LINE + 2 {
                self.give_up("it has a line that is too long");
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

    /// Whether nothing that follows could belong to it.
    pub fn has_ended(&self) -> bool {
        self.outcome.is_some()
    }

    /// How many of the bytes so far stand before the line of the first digit.
    pub fn before_digits(&self) -> u64 {
        self.before_digits
    }

    /// What came of it, for a list of that many records, and how many of these are
    /// carried.
    pub fn finish(mut self, checksum: u32, records: u64) -> (UsageCounts, CarriedCounts) {
        // The last line needs no line break after it.
        if self.outcome.is_none() && !self.line.is_empty() {
            self.line(checksum, &mut |_, _| false);
        }
        let carried = self.carried.unwrap_or_default();
        let outcome = match self.outcome {
            None if self.lines == 0 => UsageCounts::Missing,
            None => UsageCounts::Ignored("it is cut short"),
            Some(UsageCounts::Saved) if self.digits != records => {
                UsageCounts::Ignored(NOT_ONE_EACH)
            }
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

    fn give_up(&mut self, reason: &'static str) {
        // What never began as a trailer is none.
        self.outcome = Some(if self.lines == 0 {
            UsageCounts::Missing
        } else {
            UsageCounts::Ignored(reason)
        });
    }

    fn line(&mut self, checksum: u32, usage_count: &mut impl FnMut(u64, u8) -> bool) {
        let line = std::mem::take(&mut self.line);
        if let Err(reason) = self.parse(line.trim_ascii_end(), checksum, usage_count) {
            self.give_up(reason);
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
                return Err("it does not say what it holds");
            }
        } else if let Some(digits) = line.strip_prefix(CHECKSUM.as_bytes()) {
            let mut expected = [0; 8];
            write!(&mut expected[..], "{checksum:08x}").expect("32 bits have eight digits");
            if digits != expected {
                return Err("its checksum differs");
            }
            self.outcome = Some(UsageCounts::Saved);
        } else if let Some(counts) = line.strip_prefix(CARRIED.as_bytes())
            && self.carried.is_none()
        {
            let counts = parse_carried(counts).ok_or("it has an invalid line")?;
            self.carried = Some(counts);
        } else if self.carried.is_some() {
            return Err("it has an invalid line");
        } else {
            for &digit in line {
                if !usage_count(self.digits, digit) {
                    return Err(NOT_ONE_EACH);
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
