//! What goes to standard output: a JSON object, or lines of `name  value`.
//!
//! A reader that goes away (`kvar ... | head`) is no error worth a panic; a full disk is.

use crate::failure::{Failure, Outcome};
use serde::Serialize;
use std::io::Write as _;

/// Writes text and a line end.
pub(crate) fn line(text: &str) -> Outcome {
    bytes(format!("{text}\n").as_bytes())
}

/// Writes raw bytes.
pub(crate) fn bytes(bytes: &[u8]) -> Outcome {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// One JSON object on one line.
pub(crate) fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string(value).map_err(|error| Failure::failed(error.to_string()))?;
    line(&text)
}

/// Rows as columns; the first column to the left, all others to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> Outcome {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut out = String::new();
    for row in rows {
        let mut text = String::new();
        for (column, cell) in row.iter().enumerate() {
            if column == 0 {
                text.push_str(&format!("{cell:<width$}", width = widths[0]));
            } else {
                text.push_str(&format!("  {cell:>width$}", width = widths[column]));
            }
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    bytes(out.as_bytes())
}

/// Names and values, both to the left.
pub(crate) fn named(rows: &[Vec<String>]) -> Outcome {
    let width = rows
        .iter()
        .filter_map(|row| row.first())
        .map(String::len)
        .max()
        .unwrap_or(0);
    let text: String = rows
        .iter()
        .map(|row| format!("{:<width$}  {}\n", row[0], row[1..].join("  ")))
        .collect();
    bytes(text.as_bytes())
}
