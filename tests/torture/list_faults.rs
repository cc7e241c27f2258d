//! Faults of the list's file: a disk that is full or fails, something else in place of
//! the list, and damaged lists.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rand::Rng;

use super::arena::Arena;
use super::list::List;
use super::process;
use crate::common::{Fault, LIST, Shutdown, give_to_server, limit_file_size, wait_until};

pub const FAULTS: &[super::Kind] = &[
    ("disk-full-in-dump", disk_full_in_dump),
    ("disk-full-at-shutdown", disk_full_at_shutdown),
    ("file-size-limit", file_size_limit),
    ("link-in-place-of-new-list", link_in_place_of_new_list),
    (
        "directory-in-place-of-new-list",
        directory_in_place_of_new_list,
    ),
    ("pipe-in-place-of-new-list", pipe_in_place_of_new_list),
    ("directory-in-place-of-list", directory_in_place_of_list),
    ("pipe-in-place-of-list", pipe_in_place_of_list),
    ("no-permission-for-list", no_permission_for_list),
    ("read-only-directory", read_only_directory),
    ("damaged-list", damaged_list),
    ("no-list", no_list),
];

const NEW_LIST: &str = "autoprewarm.blocks.tmp";

/// A dump, by the leader or by a session, that must fail and keep the list.
fn failing_dump(arena: &mut Arena, error: &'static str) {
    let before = arena.read_list();
    if arena.round.coin() {
        let state = arena
            .call("postgres", "SELECT autoprewarm_dump_now()")
            .wait();
        assert!(state.is_some(), "the dump did not fail");
    } else {
        arena.round.allowed.push(error);
        let mark = arena.cluster.log_end();
        arena.set("pg_prewarm.autoprewarm_interval", "1");
        arena.reload();
        arena
            .cluster
            .wait_for_log(mark, "The previous block dump file is kept");
        arena.set("pg_prewarm.autoprewarm_interval", "0");
        arena.reload();
        // The leader may have begun the next one.
        arena.settle();
        let rows = arena.query("postgres", "SELECT last_error FROM pg_stat_autoprewarm");
        let shown: Option<&str> = rows[0].get(0);
        assert!(
            shown.is_some_and(|text| text.contains(error)),
            "the last error is {shown:?}"
        );
    }
    assert!(
        arena.read_list() == before,
        "a dump that failed has changed the list"
    );
}

/// A disk error at a random step of the dump.
fn bad_disk(arena: &mut Arena) -> &'static str {
    let error = arena.round.choose(&[libc::ENOSPC, libc::EIO, libc::EDQUOT]);
    let (fault, text) = arena.round.choose(&[
        (Fault::ListWrite, "could not write to file"),
        (Fault::ListClose, "could not close file"),
        (Fault::ListRename, "could not rename file"),
    ]);
    arena.cluster.set_fault(fault, error.into());
    text
}

fn disk_full_in_dump(arena: &mut Arena) {
    arena.settle();
    let error = bad_disk(arena);
    match error {
        // The server raises this error, without the hint that the round waits for.
        "could not rename file" => {
            let before = arena.read_list();
            let state = arena
                .call("postgres", "SELECT autoprewarm_dump_now()")
                .wait();
            assert!(state.is_some(), "the dump did not fail");
            assert!(arena.read_list() == before);
        }
        _ => failing_dump(arena, error),
    }
    arena.back_to_normal();
}

fn disk_full_at_shutdown(arena: &mut Arena) {
    arena.settle();
    let error = bad_disk(arena);
    arena.round.allowed.push(error);
    let before = arena.read_list();
    let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Smart]);
    arena.cluster.stop(how);
    assert!(
        arena.read_list() == before,
        "a dump that failed has changed the list"
    );
    assert!(!arena.cluster.data(NEW_LIST).exists());
    arena.back_to_normal();
    arena.cluster.start();
}

fn file_size_limit(arena: &mut Arena) {
    let leader = arena.settle();
    let bytes = arena.round.rng.random_range(0..30_000);
    // The leader's log exceeds the limit, so the leader logs nothing.
    limit_file_size(leader, Some(bytes));
    let before = arena.read_list();
    arena.set("pg_prewarm.autoprewarm_interval", "1");
    arena.reload();
    arena.round.allowed.push("could not write to file");
    wait_until("a dump that fails", || {
        let rows = arena.query("postgres", "SELECT last_error FROM pg_stat_autoprewarm");
        rows[0]
            .get::<_, Option<&str>>(0)
            .is_some_and(|text| text.contains("could not write to file"))
    });
    assert!(
        arena.read_list() == before,
        "a dump that failed has changed the list"
    );
    limit_file_size(leader, None);
    arena.set("pg_prewarm.autoprewarm_interval", "0");
    arena.reload();
}

/// Puts something in place of the new list, makes the server dump, and removes it.
fn in_place_of_new_list(arena: &mut Arena, put: impl Fn(&Path), may_be_replaced: bool) {
    arena.settle();
    let path = arena.cluster.data(NEW_LIST);
    let _ = fs::remove_file(&path);
    put(&path);
    if may_be_replaced {
        arena.run("postgres", "SELECT autoprewarm_dump_now()");
        put(&path);
        arena.restart(Shutdown::Fast);
    } else {
        failing_dump(arena, "could not open file");
        arena.round.allowed.push("could not open file");
        let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Immediate]);
        arena.restart(how);
        fs::remove_dir_all(&path).unwrap();
    }
    assert!(fs::symlink_metadata(&path).is_err());
}

/// The link is replaced, and its target is not written to.
fn link_in_place_of_new_list(arena: &mut Arena) {
    let planted = arena.cluster.path("planted");
    fs::write(&planted, "precious").unwrap();
    give_to_server(&planted);
    let target = arena.round.choose(&["/dev/full".into(), planted.clone()]);
    in_place_of_new_list(arena, |path| symlink(&target, path).unwrap(), true);
    assert_eq!(fs::read_to_string(&planted).unwrap(), "precious");
}

fn pipe_in_place_of_new_list(arena: &mut Arena) {
    in_place_of_new_list(arena, make_pipe, true);
}

fn directory_in_place_of_new_list(arena: &mut Arena) {
    let directory = |path: &Path| {
        fs::create_dir(path).unwrap();
        give_to_server(path);
    };
    in_place_of_new_list(arena, directory, false);
}

fn make_pipe(path: &Path) {
    let mut command = std::process::Command::new("mkfifo");
    crate::common::run(command.arg(path));
    give_to_server(path);
}

/// The list cannot be read, and what is in its place is not replaced. Once the list can
/// be read, it is loaded.
fn in_place_of_list(arena: &mut Arena, damage: impl Fn(&Path), repair: impl Fn(&Path)) {
    let path = arena.cluster.data(LIST);
    arena.round.allowed.push("could not read file");
    arena.cluster.stop(Shutdown::Fast);
    let before = arena.read_list();
    damage(&path);
    let mark = arena.cluster.log_end();
    arena.cluster.start();
    arena
        .cluster
        .wait_for_log(mark, "could not read file \"autoprewarm.blocks\"");
    if arena.round.coin() {
        let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Immediate]);
        let mark = arena.cluster.log_end();
        arena.restart(how);
        arena
            .cluster
            .wait_for_log(mark, "could not read file \"autoprewarm.blocks\"");
    }
    repair(&path);
    assert!(
        arena.read_list() == before,
        "a list that was not loaded was replaced"
    );
    arena.reload();
}

fn aside(path: &Path) -> std::path::PathBuf {
    path.with_file_name("aside")
}

fn directory_in_place_of_list(arena: &mut Arena) {
    in_place_of_list(
        arena,
        |path| {
            fs::rename(path, aside(path)).unwrap();
            fs::create_dir(path).unwrap();
            give_to_server(path);
        },
        |path| {
            fs::remove_dir(path).unwrap();
            fs::rename(aside(path), path).unwrap();
        },
    );
}

fn pipe_in_place_of_list(arena: &mut Arena) {
    in_place_of_list(
        arena,
        |path| {
            fs::rename(path, aside(path)).unwrap();
            make_pipe(path);
        },
        // It replaces the pipe atomically.
        |path| fs::rename(aside(path), path).unwrap(),
    );
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn no_permission_for_list(arena: &mut Arena) {
    in_place_of_list(
        arena,
        |path| set_mode(path, 0),
        |path| set_mode(path, 0o600),
    );
}

/// No file can be created, so dumps fail, but loads work.
fn read_only_directory(arena: &mut Arena) {
    arena.settle();
    let directory = arena.cluster.data("");
    let mode = fs::metadata(&directory).unwrap().permissions().mode();
    set_mode(&directory, 0o500);
    failing_dump_in_read_only_directory(arena);
    set_mode(&directory, mode);
}

fn failing_dump_in_read_only_directory(arena: &mut Arena) {
    let before = arena.read_list();
    let state = arena
        .call("postgres", "SELECT autoprewarm_dump_now()")
        .wait();
    assert_eq!(state.as_deref(), Some("42501"));
    let state = arena
        .call("postgres", "SELECT autoprewarm_load_now()")
        .wait();
    assert_eq!(state, None);
    arena.settle();
    assert!(
        arena.read_list() == before,
        "a dump that failed has changed the list"
    );
}

/// The list is damaged randomly: its valid records are loaded, and the server goes on.
fn damaged_list(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena
        .round
        .allowed
        .push("autoprewarm block dump file is corrupted at line");
    arena.cluster.stop(Shutdown::Fast);
    let path = arena.cluster.data(LIST);
    let mut bytes = fs::read(&path).unwrap();
    for _ in 0..arena.round.rng.random_range(1..5) {
        damage(arena, &mut bytes);
    }
    arena.cluster.write_list(&bytes);
    arena.cluster.start();
    arena.settle();
    arena.run("postgres", "SELECT count(*) FROM autoprewarm_blocks()");
    let how = arena.round.choose(&[Shutdown::Fast, Shutdown::Immediate]);
    arena.cluster.stop(how);
    if how == Shutdown::Fast {
        List::read(&path);
    }
    arena.cluster.start();
    arena.warm();
}

fn damage(arena: &mut Arena, bytes: &mut Vec<u8>) {
    let rng = &mut arena.round.rng;
    let at = rng.random_range(0..=bytes.len());
    match rng.random_range(0..6) {
        0 => bytes.truncate(at),
        1 => {
            let end = bytes.len().min(at + rng.random_range(0..5000));
            rng.fill(&mut bytes[at..end]);
        }
        2 => {
            let end = bytes.len().min(at + rng.random_range(0..5000));
            bytes.drain(at..end);
        }
        3 => {
            let piece = bytes[at..bytes.len().min(at + 3000)].to_vec();
            bytes.extend(piece);
        }
        4 => bytes
            .splice(0..bytes.len().min(8), *b"<<2147483647>>\n")
            .for_each(drop),
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = rng.random();
            }
        }
    }
}

/// The list was removed: nothing is loaded, and the next dump creates one.
fn no_list(arena: &mut Arena) {
    arena.round.may_skip = true;
    arena.settle();
    if arena.round.coin() {
        arena.cluster.stop(Shutdown::Fast);
        fs::remove_file(arena.cluster.data(LIST)).unwrap();
        arena.cluster.start();
    } else {
        fs::remove_file(arena.cluster.data(LIST)).unwrap();
        arena.crash();
    }
    arena.settle();
    assert!(!process::named(&arena.cluster.data(""), "autoprewarm leader").is_empty());
    arena.warm();
}
