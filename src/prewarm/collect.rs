//! Finding the relations that a call prewarms: tables with their indexes, TOAST tables,
//! partitions and inheritance children, after all checks. Locks are held only for that.

use std::ffi::CString;

use rustc_hash::FxHashSet;

use super::read::Part;
use crate::blocks::{BlockNumber, Fork, Oid};
use crate::pg::process::check_for_interrupts;
use crate::pg::process::transaction::Transaction;
use crate::pg::storage::catalog;
use crate::pg::storage::relation::Relation;

/// Which relations and forks are to be prewarmed beside a table itself.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub indexes: bool,
    pub toast: bool,
    /// Partitions and inheritance children, at any depth.
    pub partitions: bool,
    pub forks: Vec<Fork>,
}

/// The kind of a relation, in the order of prewarming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Indexes are small and used by most queries, so they come first.
    Index,
    /// Tables, TOAST tables, materialized views, sequences.
    Heap,
}

/// One fork of a relation that is to be prewarmed.
pub struct Collected {
    pub part: Part,
    pub name: CString,
    pub class: Class,
    pub is_btree: bool,
    pub is_temporary: bool,
    pub blocks: BlockNumber,
}

/// The relations to be prewarmed, and how many were skipped.
#[derive(Default)]
pub struct Collection {
    pub parts: Vec<Collected>,
    /// Relations for which the caller lacks the SELECT privilege.
    pub denied: usize,
    /// Partitions and inheritance children that are foreign tables.
    pub foreign: usize,
    seen: FxHashSet<Oid>,
}

impl Collection {
    /// The relation that the caller named, after all checks. SELECT on it covers its
    /// indexes, TOAST table, partitions and inheritance children, as it does in a query
    /// of it.
    pub fn of_relation(transaction: &Transaction, oid: pgrx::pg_sys::Oid, wanted: &Wanted) -> Self {
        let mut collection = Self::default();
        let relation = Relation::open_with_table(transaction, oid);
        relation.check_select_privilege();
        if !relation.is_partitioned() {
            relation.check_storage();
        }
        relation.check_not_other_temp();
        // A partitioned table has no storage, and is left out here.
        collection.add(transaction, relation, wanted);
        if wanted.partitions {
            for oid in catalog::inheritance_tree(transaction, oid.to_u32()) {
                collection.add_if_there(transaction, oid, wanted);
            }
        }
        collection
    }

    /// All relations in a schema, or in the database, on which the caller has the SELECT
    /// privilege. SELECT on a partitioned table covers its partitions here as well. SELECT
    /// on an inheritance parent does not cover its children, which the server lets be read
    /// through the parent only, and no parent was named.
    pub fn of_schema(
        transaction: &Transaction,
        schema: Option<pgrx::pg_sys::Oid>,
        system: bool,
        wanted: &Wanted,
    ) -> Self {
        let mut collection = Self::default();
        for oid in catalog::all_with_storage(transaction, schema, system) {
            check_for_interrupts();
            // The privilege is checked before the lock is requested, so that a caller
            // without it does not wait for the lock.
            match catalog::may_be_selected_from(transaction, oid) {
                Some(true) => collection.add_if_there(transaction, oid, wanted),
                Some(false) => collection.denied += 1,
                None => {}
            }
        }
        collection
    }

    /// Adds a relation, unless it was dropped meanwhile.
    fn add_if_there(&mut self, transaction: &Transaction, oid: Oid, wanted: &Wanted) {
        check_for_interrupts();
        if let Some(relation) = Relation::try_open_with_table(transaction, oid) {
            self.add(transaction, relation, wanted);
        }
    }

    /// Adds a relation, its indexes, and its TOAST table with that table's index.
    fn add(&mut self, transaction: &Transaction, relation: Relation, wanted: &Wanted) {
        if relation.is_foreign_table() {
            self.foreign += 1;
        }
        if !relation.has_storage() || relation.is_other_temp() || !self.seen.insert(relation.oid())
        {
            return;
        }
        for &fork in &wanted.forks {
            if relation.has_fork(fork) {
                self.parts.push(Collected {
                    part: Part::of(&relation, fork),
                    name: relation.name(),
                    class: match relation.is_index() {
                        true => Class::Index,
                        false => Class::Heap,
                    },
                    is_btree: relation.is_btree(),
                    is_temporary: relation.is_temporary(),
                    blocks: relation.blocks(fork),
                });
            }
        }
        let indexes = match wanted.indexes {
            true => relation.indexes(),
            false => Vec::new(),
        };
        let toast = relation.toast_table().filter(|_| wanted.toast);
        drop(relation);
        for oid in indexes.into_iter().chain(toast) {
            self.add_if_there(transaction, oid, wanted);
        }
    }

    /// Sorts the parts into the order of prewarming: indexes before tables, small
    /// before large.
    pub fn sort(&mut self) {
        self.parts
            .sort_by_key(|part| (part.class, part.blocks, part.part.relation, part.part.fork));
    }
}
