//! The safe types, tried within a server.

#[pgrx::pg_schema]
mod tests {
    use std::ops::ControlFlow::Continue;

    use pgrx::prelude::*;

    use crate::blocks::{Fork, Record};
    use crate::pg::process::error::catch;
    use crate::pg::process::memory::{fallible, infallible, may_be_refused, room_for};
    use crate::pg::process::transaction::Transaction;
    use crate::pg::storage::buffer::cached_blocks;
    use crate::pg::storage::database::Database;
    use crate::pg::storage::relation::{Locator, Opened, Relation, fork_by_name};

    /// Makes a table of a few blocks, and returns its OID and its first block.
    fn table() -> (pg_sys::Oid, Record) {
        Spi::run("CREATE TABLE t AS SELECT g FROM generate_series(1, 1000) g").unwrap();
        let (oid, filenumber) = Spi::get_two::<pg_sys::Oid, pg_sys::Oid>(
            "SELECT 't'::regclass::oid, pg_relation_filenode('t')",
        )
        .unwrap();
        let (database, tablespace) = Spi::get_two::<pg_sys::Oid, pg_sys::Oid>(
            "SELECT oid, dattablespace FROM pg_database WHERE datname = current_database()",
        )
        .unwrap();
        let [database, tablespace, filenumber] =
            [database, tablespace, filenumber].map(|oid| oid.unwrap().to_u32());
        let record = Record {
            database,
            tablespace,
            filenumber,
            fork: Fork::Main as u32,
            block: 0,
        };
        (oid.unwrap(), record)
    }

    fn transaction() -> &'static Transaction {
        // SAFETY: each test runs in a transaction, and is over before it ends.
        unsafe { Transaction::current() }
    }

    fn open(record: Record) -> Option<Relation<'static>> {
        let locator = Locator {
            database: record.database,
            tablespace: record.tablespace,
            filenumber: record.filenumber,
        };
        match Relation::open_by_file(transaction(), locator, false) {
            Opened::Open(relation) => Some(relation),
            Opened::Locked | Opened::Gone => None,
        }
    }

    #[pg_test]
    fn a_block_that_was_read_is_among_the_cached_blocks() {
        let (_, record) = table();
        open(record)
            .unwrap()
            .read_into_buffers(Fork::Main, &[0], true, |_, _| Continue(()));
        let cached: Vec<_> = cached_blocks()
            .filter(|block| block.record == record)
            .collect();
        assert_eq!(cached.len(), 1);
        assert!(cached[0].permanent);
    }

    #[pg_test]
    fn memory_that_is_refused_to_one_who_asks_is_an_error_and_not_the_end() {
        let error = catch(|| room_for::<u64>(1 << 45)).unwrap_err();
        assert_eq!(error.sqlstate, PgSqlErrorCode::ERRCODE_OUT_OF_MEMORY);
        assert!(!may_be_refused());
        let asked = fallible(|| {
            assert!(may_be_refused());
            Vec::<u64>::new().try_reserve(1 << 45)
        });
        assert!(asked.is_err());
    }

    #[pg_test]
    fn memory_may_be_refused_within_fallible_calls_only_whatever_ends_them() {
        let raised = catch(|| {
            fallible(|| {
                let raised = infallible(|| {
                    assert!(!may_be_refused());
                    catch(|| fallible(|| infallible(|| fork_by_name(c"bogus"))))
                });
                assert!(raised.is_err() && may_be_refused());
                infallible(|| fork_by_name(c"bogus"))
            })
        });
        assert!(raised.is_err());
        assert!(!may_be_refused());
    }

    #[pg_test]
    fn a_relation_is_opened_by_its_own_file_only() {
        let (oid, record) = table();
        let relation = open(record).unwrap();
        assert_eq!(relation.name().as_c_str(), c"t");
        assert!(relation.blocks(Fork::Main) > 1);
        assert!(!relation.has_fork(Fork::Init));
        assert_eq!(
            Relation::open_with_table(transaction(), oid)
                .name()
                .as_c_str(),
            c"t"
        );
        for other in [
            Record {
                database: 0,
                ..record
            },
            Record {
                tablespace: 1664,
                ..record
            },
            Record {
                filenumber: 1,
                ..record
            },
        ] {
            assert!(open(other).is_none(), "{other:?}");
        }
    }

    #[pg_test]
    fn a_shared_catalog_is_opened_as_one_of_database_0() {
        let filenumber = Spi::get_one::<pg_sys::Oid>("SELECT pg_relation_filenode('pg_database')")
            .unwrap()
            .unwrap()
            .to_u32();
        const GLOBAL_TABLESPACE: u32 = 1664;
        let record = Record {
            database: 0,
            tablespace: GLOBAL_TABLESPACE,
            filenumber,
            fork: 0,
            block: 0,
        };
        assert_eq!(open(record).unwrap().name().as_c_str(), c"pg_database");
    }

    #[pg_test]
    fn databases_are_known_as_they_are() {
        let oid_of = |name: &str| {
            Spi::get_one_with_args::<pg_sys::Oid>(
                "SELECT oid FROM pg_database WHERE datname = $1",
                &[name.into()],
            )
            .unwrap()
            .unwrap()
            .to_u32()
        };
        let databases = Database::all(transaction());
        let postgres = databases[&oid_of("postgres")];
        assert!(!postgres.is_template && postgres.accepts_connections);
        assert!(databases[&oid_of("template1")].is_template);
        assert!(!databases[&oid_of("template0")].accepts_connections);
        let count = Spi::get_one::<i64>("SELECT count(*) FROM pg_database");
        assert_eq!(count, Ok(Some(databases.len() as i64)));
    }

    #[pg_test]
    fn an_error_that_is_caught_is_told_with_its_code() {
        let caught = catch(|| fork_by_name(c"bogus")).unwrap_err();
        assert_eq!(
            caught.sqlstate,
            PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE
        );
        assert_eq!(caught.message, "invalid fork name");
        assert!(caught.hint.is_some());
    }
}
