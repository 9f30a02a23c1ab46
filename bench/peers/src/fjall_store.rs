//! fjall: a log-structured merge tree with its values in files of their own, not compressed.

use crate::measure::{Reads, Run, Tally, next_random};
use crate::{MEMORY_BYTES, Store, is_value, value};
use anyhow::Result;
use fjall::{Database, Keyspace, KeyspaceCreateOptions, KvSeparationOptions, PersistMode};
use std::path::Path;
use std::time::Instant;

pub(crate) struct Fjall {
    database: Database,
    values: Keyspace,
    runs: u64,
}

impl Fjall {
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let database = Database::builder(folder)
            .cache_size(MEMORY_BYTES as u64)
            .open()?;
        let values = database.keyspace("values", || {
            KeyspaceCreateOptions::default()
                .with_kv_separation(Some(KvSeparationOptions::default()))
        })?;
        Ok(Self {
            database,
            values,
            runs: 0,
        })
    }
}

impl Store for Fjall {
    fn is_cached_by_the_system(&self) -> bool {
        true
    }

    fn fill(&mut self, values: u64) -> Result<()> {
        for number in 0..values {
            self.values.insert(number.to_be_bytes(), value(number))?;
        }
        self.values.rotate_memtable_and_wait()?;
        self.database.persist(PersistMode::SyncAll)?;
        Ok(())
    }

    fn read(&mut self, values: u64, depth: usize, seconds: f64) -> Result<Reads> {
        let mut run = Run::begin(seconds);
        let end = run.end_at();
        self.runs += 1;
        let seed = self.runs;
        let store = &self.values;
        let tallies: Vec<Result<Tally>> = std::thread::scope(|scope| {
            let readers: Vec<_> = (0..depth)
                .map(|reader| {
                    scope.spawn(move || {
                        let mut random = (seed * 1000 + reader as u64) << 32;
                        let mut tally = Tally::new();
                        while Instant::now() < end {
                            let number = next_random(&mut random) % values;
                            let since = Instant::now();
                            let found = store.get(number.to_be_bytes())?;
                            let is_right = found.map(|bytes| is_value(&bytes, number));
                            tally.count(since.elapsed(), is_right);
                        }
                        Ok(tally)
                    })
                })
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().expect("a reader does not panic"))
                .collect()
        });
        for tally in tallies {
            run.tally.add(&tally?);
        }
        Ok(run.finish())
    }
}
