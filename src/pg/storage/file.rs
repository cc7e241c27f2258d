//! Files in the data directory, which is the working directory of every server process.

use std::ffi::{CStr, CString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::IntoRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::rc::Rc;

use pgrx::{PgLogLevel, PgSqlErrorCode, pg_sys};

use crate::pg::process::check_for_interrupts;
use crate::pg::sys::ffi;

/// Whether [`open`] has failed since there is something else of that name, such as a directory
/// or a pipe.
pub fn is_no_file(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EISDIR | libc::EINVAL))
}

/// A file that may be open for a long time. The server counts it, so that this process
/// keeps to its limit of open files.
pub struct OpenFile {
    file: File,
    _descriptor: Descriptor,
}

/// One of the file descriptors that the server leaves to extensions.
struct Descriptor;

impl Descriptor {
    /// Fails if extensions have a third of all already.
    fn acquire() -> io::Result<Self> {
        // SAFETY: it counts, and may close files that the server does not use.
        match unsafe { pg_sys::AcquireExternalFD() } {
            true => Ok(Self),
            false => Err(io::Error::from_raw_os_error(libc::EMFILE)),
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: `acquire` has counted it. It raises no ERROR, so this is allowed while
        // one unwinds.
        unsafe { ffi::ReleaseExternalFD() };
    }
}

impl Read for OpenFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

/// Opens a regular file for reading, and returns its size in bytes as well. Anything
/// else of that name is an error; a pipe is not waited for.
pub fn open(path: &str) -> io::Result<(OpenFile, u64)> {
    let descriptor = Descriptor::acquire()?;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    if !metadata.is_file() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let file = OpenFile {
        file,
        _descriptor: descriptor,
    };
    Ok((file, metadata.len()))
}

/// A new file. It serves interrupts before each write, and is flushed while it is written,
/// unless `fsync` is off: flushing gigabytes at its end would keep a process from serving
/// interrupts for as long as the disk needs.
pub struct NewFile {
    file: File,
    /// How many bytes were written since it was last flushed.
    unflushed: usize,
}

impl NewFile {
    /// How much is flushed at once.
    const FLUSHED: usize = 16 << 20;

    fn flush_if_due(&mut self) -> io::Result<()> {
        if self.unflushed < Self::FLUSHED {
            return Ok(());
        }
        self.unflushed = 0;
        // SAFETY: a setting, which changes only while this process serves a reload.
        let is_enabled = unsafe { (&raw const pg_sys::enableFsync).read() };
        match is_enabled {
            true => self.file.sync_data(),
            false => Ok(()),
        }
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        check_for_interrupts();
        let written = self.file.write(bytes)?;
        self.unflushed += written;
        self.flush_if_due()?;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Seek for NewFile {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.file.seek(position)
    }
}

/// Creates a file for writing, and removes one that an earlier attempt has left behind. A
/// symbolic link is removed, not followed. The file has the permissions of the data
/// directory, by the server's umask.
pub fn create(path: &str) -> io::Result<NewFile> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().write(true).create_new(true).open(path)?;
    Ok(NewFile { file, unflushed: 0 })
}

/// Closes a file that was written to. Some file systems report a failed write only then.
pub fn close(new: NewFile) -> io::Result<()> {
    // SAFETY: the descriptor was taken from the file, so nothing else closes it.
    match unsafe { libc::close(new.file.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Renames a file durably: it and its directory are flushed, unless `fsync` is off. Raises
/// an ERROR if that fails.
pub fn rename_durably(from: &str, to: &str) {
    let [from, to] = [from, to].map(|path| CString::new(path).expect("a path has no NUL"));
    // SAFETY: two C strings that outlive the call.
    unsafe { pg_sys::durable_rename(from.as_ptr(), to.as_ptr(), PgLogLevel::ERROR as i32) };
}

/// Removes a file durably: its directory is flushed, unless `fsync` is off. A file that is
/// missing is removed already. Raises an ERROR if that fails.
pub fn remove_durably(path: &str) {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return;
    }
    let path = CString::new(path).expect("a path has no NUL");
    // SAFETY: a C string that outlives the call.
    unsafe { pg_sys::durable_unlink(path.as_ptr(), PgLogLevel::ERROR as i32) };
}

/// The target of a symbolic link, which need not exist. `None` if the path is no symbolic
/// link.
pub fn link_target(path: &str) -> Option<String> {
    let target = fs::read_link(path).ok()?;
    Some(target.to_string_lossy().into_owned())
}

/// The full path of a file in the data directory.
pub fn full_path(name: &str) -> String {
    // SAFETY: the postmaster has set it to a C string, which does not change.
    let directory = unsafe { CStr::from_ptr(pg_sys::DataDir) };
    format!("{}/{name}", directory.to_string_lossy())
}

/// A reader that serves interrupts before each read, and fails when it is to stop.
pub struct Interruptible<R, S> {
    pub reader: R,
    pub should_stop: S,
}

impl<R: Read, S: Fn() -> bool> Read for Interruptible<R, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        check_for_interrupts();
        if (self.should_stop)() {
            return Err(io::Error::other("interrupted"));
        }
        self.reader.read(buffer)
    }
}

/// A reader with its own offset in a file that it shares with others.
pub struct At {
    pub file: Rc<OpenFile>,
    pub offset: u64,
}

impl Read for At {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.file.file.read_at(buffer, self.offset)?;
        self.offset += length as u64;
        Ok(length)
    }
}

/// The system's text for an error, as `%m` prints it.
pub fn describe(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// The SQLSTATE of a file's error, as `errcode_for_file_access` gives it.
pub fn sqlstate(error: &io::Error) -> PgSqlErrorCode {
    if error.kind() == io::ErrorKind::OutOfMemory {
        return PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY;
    }
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES | libc::EROFS) => {
            PgSqlErrorCode::ERRCODE_INSUFFICIENT_PRIVILEGE
        }
        Some(libc::ENOENT) => PgSqlErrorCode::ERRCODE_UNDEFINED_FILE,
        Some(libc::EEXIST) => PgSqlErrorCode::ERRCODE_DUPLICATE_FILE,
        Some(libc::ENOTDIR | libc::EISDIR | libc::ENOTEMPTY) => {
            PgSqlErrorCode::ERRCODE_WRONG_OBJECT_TYPE
        }
        Some(libc::ENOSPC) => PgSqlErrorCode::ERRCODE_DISK_FULL,
        Some(libc::ENFILE | libc::EMFILE) => PgSqlErrorCode::ERRCODE_INSUFFICIENT_RESOURCES,
        Some(libc::EIO) => PgSqlErrorCode::ERRCODE_IO_ERROR,
        _ => PgSqlErrorCode::ERRCODE_INTERNAL_ERROR,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_error_reads_as_the_server_would_word_it() {
        let error = io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(describe(&error), "No space left on device");
        assert_eq!(describe(&io::Error::other("odd")), "odd");
    }
}
