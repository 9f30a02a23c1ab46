//! foyer: a hybrid cache with a small memory and its block engine on files, direct I/O.

use crate::measure::{Reads, Run, Tally, next_random};
use crate::{MEMORY_BYTES, Store, is_value, value};
use anyhow::Result;
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder,
    IoEngineConfig, PsyncIoEngineConfig, UringIoEngineConfig,
};
use std::path::Path;
use std::time::Instant;
use tokio::runtime::Runtime;

pub(crate) struct Foyer {
    runtime: Runtime,
    cache: HybridCache<u64, Vec<u8>>,
    runs: u64,
}

impl Foyer {
    pub(crate) fn open(folder: &Path, bytes: usize, uring: bool) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?;
        let cache = runtime.block_on(async {
            // Room for what the values carry with them, and for blocks it keeps free.
            let device = FsDeviceBuilder::new(folder)
                .with_capacity(bytes / 4 * 5 + (256 << 20))
                .with_direct(true)
                .build()?;
            let builder = HybridCacheBuilder::new()
                .memory(MEMORY_BYTES)
                .with_weighter(|_, value: &Vec<u8>| value.len())
                .storage()
                .with_engine_config(BlockEngineConfig::new(device));
            let io: Box<dyn IoEngineConfig> = if uring {
                UringIoEngineConfig::new().boxed()
            } else {
                PsyncIoEngineConfig::new().boxed()
            };
            let builder = builder.with_io_engine_config(io);
            anyhow::Ok(builder.build().await?)
        })?;
        Ok(Self {
            runtime,
            cache,
            runs: 0,
        })
    }
}

impl Store for Foyer {
    fn fill(&mut self, values: u64) -> Result<()> {
        let cache = self.cache.clone();
        self.runtime.block_on(async move {
            for number in 0..values {
                cache.storage_writer(number).force().insert(value(number));
                // Its queue drops what it cannot take at once.
                if number % 64 == 63 {
                    cache.storage().wait().await;
                }
            }
            cache.storage().wait().await;
        });
        Ok(())
    }

    fn read(&mut self, values: u64, depth: usize, seconds: f64) -> Result<Reads> {
        let mut run = Run::begin(seconds);
        let end = run.end_at();
        self.runs += 1;
        let seed = self.runs;
        let tallies = self.runtime.block_on(async {
            let readers: Vec<_> = (0..depth)
                .map(|reader| {
                    let cache = self.cache.clone();
                    tokio::spawn(async move {
                        let mut random = (seed * 1000 + reader as u64) << 32;
                        let mut tally = Tally::new();
                        while Instant::now() < end {
                            let number = next_random(&mut random) % values;
                            let since = Instant::now();
                            let found = cache.get(&number).await.ok().flatten();
                            let is_right = found.map(|entry| is_value(entry.value(), number));
                            tally.count(since.elapsed(), is_right);
                        }
                        tally
                    })
                })
                .collect();
            let mut tallies = Vec::new();
            for reader in readers {
                tallies.push(reader.await?);
            }
            anyhow::Ok(tallies)
        })?;
        tallies.iter().for_each(|tally| run.tally.add(tally));
        Ok(run.finish())
    }
}
