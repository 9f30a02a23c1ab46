//! Opening a trace: a file, a zstd-compressed file (told by its first bytes), or `-`.

use kvar_plan::{Trace, TraceOptions};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Reads a trace from a path, or from standard input where the path is `-`.
pub(crate) fn read_trace(path: &Path, options: &TraceOptions) -> Result<Trace, String> {
    let shown = path.display();
    let raw: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(path).map_err(|error| format!("trace {shown}: {error}"))?)
    };
    let mut reader = BufReader::with_capacity(1 << 16, raw);
    let compressed = reader
        .fill_buf()
        .map_err(|error| format!("trace {shown}: {error}"))?
        .starts_with(&ZSTD_MAGIC);
    let read = if compressed {
        let decoder = zstd::Decoder::with_buffer(reader)
            .map_err(|error| format!("trace {shown}: {error}"))?;
        Trace::read(BufReader::with_capacity(1 << 16, decoder), options)
    } else {
        Trace::read(reader, options)
    };
    read.map_err(|error| format!("trace {shown}: {error}"))
}
