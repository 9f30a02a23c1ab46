//! Traces of requests: who asked for which prompt, as chained block ids and no text.
//!
//! One JSON object a line, in either form (told apart line by line by `chat_id`):
//!
//! | form | fields | timestamp | ids |
//! |---|---|---|---|
//! | Mooncake | timestamp, input_length, output_length, hash_ids, and if there: session_id, turn | ms | each 512 tokens of the input |
//! | Qwen-Bailian | chat_id, parent_chat_id, timestamp, input_length, output_length, type, turn, hash_ids | s | each 16 tokens of the input |
//!
//! `type` names the kind of traffic; each name is a number from 1 on, in the order in which they
//! appear, and goes with the request's puts as their traffic class.
//!
//! No file says how many tokens a block has, nor whether the ids end with the input or go on
//! over the output. Both follow from the lengths: of all powers of two and all ways to round,
//! the one is taken that explains the number of ids of the most requests.
//!
//! ```text
//!   ids = ceil(input / tokens)               the input; its partial last block has an id, too
//!   ids = floor(input / tokens)              the input; whole blocks
//!   ids = floor or ceil((input + output) / tokens)      input and output
//! ```
//!
//! Which ids a request looks up: those its input covers. Where ids cover the input alone that is
//! all of them; where they go on, the block in which the output begins cannot be known yet, so it
//! is the first input / tokens, rounded down.
//!
//! Coarsening by N makes one block of N: the N-th id of each N is kept (it is chained, so it
//! stands for all of them), an incomplete tail is dropped, lookups are rounded down.
//!
//! What must always be true: every broken line is named with its number and what is wrong with
//! it; nothing panics on any input; memory is bounded by the trace.

use serde::Deserialize;
use std::io::{BufRead, Read};

/// The longest line read. A million-token prompt in blocks of 16 is 65,536 ids, under 1 MB.
pub const LINE_BYTES_MAX: u64 = 16 << 20;

/// The largest block a guess considers; larger ones are given by the caller.
const BLOCK_TOKENS_GUESS_MAX: u64 = 1 << 16;

/// The share of requests whose number of ids a guess must explain. Real traces have a few odd
/// lines; a wrong guess explains far fewer.
const GUESS_SHARE_MIN: f64 = 0.9;

/// One request of a trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Arrival, in milliseconds since the trace's own start.
    pub timestamp_ms: u64,
    /// Tokens of the prompt.
    pub input_length: u64,
    /// Tokens generated.
    pub output_length: u64,
    /// Chained ids of the blocks, after coarsening: all of them are put.
    pub hash_ids: Vec<u64>,
    /// How many leading ids the input covers: these are looked up.
    pub lookup_blocks: usize,
    /// The conversation it belongs to, where the trace says (Bailian: the chat's own id).
    pub session: Option<i64>,
    /// The request it continues (Bailian: the chat id of the turn before), where the trace says.
    pub parent: Option<i64>,
    /// The turn in its conversation, where the trace says.
    pub turn: Option<u64>,
    /// What kind of traffic it is, as the writer of its blocks would say: 1 for the first kind that
    /// the trace names, and so on; 0 where it names none.
    pub traffic_class: u8,
}

impl Request {
    /// Tokens that `hit_blocks` leading hits save this request.
    #[must_use]
    pub fn hit_tokens(&self, hit_blocks: usize, block_tokens: u64) -> u64 {
        (hit_blocks as u64)
            .saturating_mul(block_tokens)
            .min(self.input_length)
    }
}

/// What the ids of a trace stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// The prompt alone; a partial last block has an id, too.
    Input,
    /// The prompt and what was generated, or whole blocks of the prompt only.
    WholeBlocks,
}

/// A trace in memory.
#[derive(Clone, Debug)]
pub struct Trace {
    /// In the order of the file.
    pub requests: Vec<Request>,
    /// Tokens of one block, after coarsening.
    pub block_tokens: u64,
    /// Whether `block_tokens` was derived from the lengths rather than given: print it then.
    pub block_tokens_guessed: bool,
    /// What the ids stand for.
    pub coverage: Coverage,
}

/// How to read a trace.
#[derive(Clone, Copy, Debug)]
pub struct TraceOptions {
    /// Tokens of one block in the file; `None`: derived from the lengths.
    pub block_tokens: Option<u64>,
    /// How many blocks of the file make one; 1 leaves them as they are.
    pub coarsen: usize,
}

impl Default for TraceOptions {
    fn default() -> Self {
        Self {
            block_tokens: None,
            coarsen: 1,
        }
    }
}

/// Why a trace could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// A line is not a request.
    #[error("line {line} of the trace is broken: {what}; repair or delete this line")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// Reading failed.
    #[error("the trace cannot be read at line {line}: {source}")]
    Read {
        /// The line that was being read, counted from 1.
        line: usize,
        /// What the reader said.
        source: std::io::Error,
    },
    /// No request at all.
    #[error("the trace holds no request: is it the right file?")]
    Empty,
    /// No block size explains the lengths.
    #[error(
        "the number of tokens of a block cannot be derived from the trace (the best guess, \
         {best}, explains {explained} of {requests} requests): say it with --block-tokens"
    )]
    BlockTokens {
        /// The best guess.
        best: u64,
        /// Requests it explains.
        explained: usize,
        /// Requests that have ids.
        requests: usize,
    },
    /// An option that means nothing.
    #[error("{0} must be at least 1")]
    Option(&'static str),
}

/// One line as it is written; both forms.
#[derive(Deserialize)]
struct Line {
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    hash_ids: Vec<u64>,
    chat_id: Option<i64>,
    parent_chat_id: Option<i64>,
    session_id: Option<i64>,
    turn: Option<u64>,
    #[serde(rename = "type")]
    kind: Option<String>,
}

/// The kinds that a trace names, in the order in which they appear.
#[derive(Default)]
struct Kinds(Vec<String>);

impl Kinds {
    /// The number of a kind, from 1 on; beyond 255 all are one.
    fn number(&mut self, kind: Option<&str>) -> u8 {
        let Some(kind) = kind else { return 0 };
        let known = self.0.iter().position(|known| known == kind);
        let at = known.unwrap_or(self.0.len());
        if known.is_none() && at < usize::from(u8::MAX) {
            self.0.push(kind.to_owned());
        }
        u8::try_from(at + 1).unwrap_or(u8::MAX)
    }
}

impl Trace {
    /// Reads a whole trace; blank lines are passed over.
    ///
    /// # Errors
    /// The first broken line, a reader's failure, an empty trace, or a block size that must be
    /// given because the lengths do not tell it.
    pub fn read(reader: impl BufRead, options: &TraceOptions) -> Result<Self, TraceError> {
        if options.coarsen == 0 {
            return Err(TraceError::Option("--coarsen"));
        }
        if options.block_tokens == Some(0) {
            return Err(TraceError::Option("--block-tokens"));
        }
        let mut requests = read_lines(reader)?;
        let guess = Guess::best(&requests, options.block_tokens);
        if options.block_tokens.is_none() {
            guess.must_explain()?;
        }
        let coarsen = options.coarsen;
        let block_tokens = guess.block_tokens.saturating_mul(coarsen as u64);
        for request in &mut requests {
            if coarsen > 1 {
                request.hash_ids = request
                    .hash_ids
                    .chunks_exact(coarsen)
                    .map(|ids| ids[coarsen - 1])
                    .collect();
            }
            let covered = if coarsen == 1 && guess.coverage == Coverage::Input {
                request.input_length.div_ceil(block_tokens)
            } else {
                request.input_length / block_tokens
            };
            let ids = request.hash_ids.len();
            request.lookup_blocks = usize::try_from(covered).unwrap_or(ids).min(ids);
        }
        Ok(Self {
            requests,
            block_tokens,
            block_tokens_guessed: options.block_tokens.is_none(),
            coverage: guess.coverage,
        })
    }
}

fn read_lines(mut reader: impl BufRead) -> Result<Vec<Request>, TraceError> {
    let (mut requests, mut bytes, mut line) = (Vec::new(), Vec::new(), 0);
    let mut kinds = Kinds::default();
    loop {
        line += 1;
        bytes.clear();
        let read = reader
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut bytes);
        match read {
            Err(source) => return Err(TraceError::Read { line, source }),
            Ok(0) => break,
            Ok(_) => {}
        }
        let broken = |what: String| TraceError::Line { line, what };
        if bytes.len() as u64 == LINE_BYTES_MAX && bytes.last() != Some(&b'\n') {
            return Err(broken(format!("it is longer than {LINE_BYTES_MAX} bytes")));
        }
        let text = bytes.trim_ascii();
        if !text.is_empty() {
            requests.push(parse_line(text, &mut kinds).map_err(broken)?);
        }
    }
    if requests.is_empty() {
        Err(TraceError::Empty)
    } else {
        Ok(requests)
    }
}

fn parse_line(text: &[u8], kinds: &mut Kinds) -> Result<Request, String> {
    const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
    if text.starts_with(&ZSTD_MAGIC) {
        return Err("this is a zstd-compressed file; decompress it first".to_owned());
    }
    let line: Line = serde_json::from_slice(text).map_err(|error| {
        // serde_json counts lines within the one line it was given; only the column helps.
        let what = error.to_string();
        let what = what.split(" at line ").next().unwrap_or_default();
        format!("{what} (column {})", error.column())
    })?;
    let to_ms = if line.chat_id.is_some() { 1000.0 } else { 1.0 };
    let timestamp_ms = line.timestamp * to_ms;
    if !(0.0..9e15).contains(&timestamp_ms) {
        return Err(format!("timestamp {} is out of range", line.timestamp));
    }
    Ok(Request {
        timestamp_ms: timestamp_ms.round() as u64,
        input_length: line.input_length,
        output_length: line.output_length,
        hash_ids: line.hash_ids,
        lookup_blocks: 0,
        session: line.chat_id.or(line.session_id),
        // Bailian writes -1 where there is no earlier turn.
        parent: line.parent_chat_id.filter(|parent| *parent >= 0),
        turn: line.turn,
        traffic_class: kinds.number(line.kind.as_deref()),
    })
}

/// A block size and coverage, and how many requests they explain.
struct Guess {
    block_tokens: u64,
    coverage: Coverage,
    explained: usize,
    requests: usize,
}

impl Guess {
    /// The best of all candidates, or of the one block size given. Of equals the smallest block
    /// wins, and then [`Coverage::Input`].
    fn best(requests: &[Request], given: Option<u64>) -> Self {
        let with_ids: Vec<_> = requests
            .iter()
            .filter(|request| !request.hash_ids.is_empty())
            .map(|request| {
                let both = request.input_length.saturating_add(request.output_length);
                (request.hash_ids.len() as u64, request.input_length, both)
            })
            .collect();
        let mut best = Self {
            block_tokens: given.unwrap_or(1),
            coverage: Coverage::Input,
            explained: 0,
            requests: with_ids.len(),
        };
        let powers = std::iter::successors(Some(1_u64), |tokens| Some(tokens * 2))
            .take_while(|tokens| *tokens <= BLOCK_TOKENS_GUESS_MAX);
        let candidates: Vec<u64> = given.map_or_else(|| powers.collect(), |tokens| vec![tokens]);
        for tokens in candidates {
            let count = |fits: &dyn Fn(u64, u64, u64) -> bool| {
                with_ids
                    .iter()
                    .filter(|(ids, input, both)| fits(*ids, *input, *both))
                    .count()
            };
            let ways = [
                (
                    Coverage::Input,
                    count(&|ids, input, _| ids == input.div_ceil(tokens)),
                ),
                (
                    Coverage::WholeBlocks,
                    count(&|ids, input, _| ids == input / tokens),
                ),
                (
                    Coverage::WholeBlocks,
                    count(&|ids, _, both| ids == both / tokens),
                ),
                (
                    Coverage::WholeBlocks,
                    count(&|ids, _, both| ids == both.div_ceil(tokens)),
                ),
            ];
            for (coverage, explained) in ways {
                if explained > best.explained {
                    best = Self {
                        block_tokens: tokens,
                        coverage,
                        explained,
                        ..best
                    };
                }
            }
        }
        best
    }

    fn must_explain(&self) -> Result<(), TraceError> {
        if self.requests > 0 && self.explained as f64 >= self.requests as f64 * GUESS_SHARE_MIN {
            return Ok(());
        }
        Err(TraceError::BlockTokens {
            best: self.block_tokens,
            explained: self.explained,
            requests: self.requests,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Trace, TraceError> {
        Trace::read(text.as_bytes(), &TraceOptions::default())
    }

    const GOOD: &str =
        r#"{"timestamp": 27, "input_length": 1300, "output_length": 9, "hash_ids": [1, 2, 3]}"#;

    #[test]
    fn the_mooncake_form_names_partial_blocks_of_the_input() {
        let trace = read(&format!("{GOOD}\n\n{GOOD}\n")).unwrap();
        assert_eq!((trace.block_tokens, trace.coverage), (512, Coverage::Input));
        assert!(trace.block_tokens_guessed);
        assert_eq!(trace.requests.len(), 2);
        let request = &trace.requests[0];
        assert_eq!((request.timestamp_ms, request.lookup_blocks), (27, 3));
        assert_eq!(request.hit_tokens(2, 512), 1024);
        assert_eq!(request.hit_tokens(3, 512), 1300);
    }

    #[test]
    fn the_bailian_form_counts_seconds() {
        let line = r#"{"chat_id": 5, "parent_chat_id": -1, "timestamp": 61.114, "input_length": 47,
            "output_length": 100, "type": "text", "turn": 1, "hash_ids": [7, 8, 9]}"#
            .replace('\n', " ");
        let trace = read(&line).unwrap();
        let request = &trace.requests[0];
        assert_eq!(trace.block_tokens, 16);
        assert_eq!(request.timestamp_ms, 61_114);
        assert_eq!(
            (request.session, request.parent, request.turn),
            (Some(5), None, Some(1))
        );
        assert_eq!(request.lookup_blocks, 3);
        assert_eq!(request.traffic_class, 1);
    }

    #[test]
    fn kinds_of_traffic_are_numbered_as_they_appear() {
        let line = |kind: &str| {
            format!(
                r#"{{"timestamp": 0, "input_length": 512, "output_length": 1, "hash_ids": [7]{kind}}}"#
            )
        };
        let kinds = [
            r#", "type": "text""#,
            r#", "type": "search""#,
            "",
            r#", "type": "text""#,
        ];
        let lines = kinds.map(line).join("\n");
        let trace = read(&lines).unwrap();
        let classes: Vec<u8> = trace.requests.iter().map(|it| it.traffic_class).collect();
        assert_eq!(classes, [1, 2, 0, 1]);
        let mut kinds = Kinds::default();
        let last = (0..300).map(|kind| kinds.number(Some(&kind.to_string())));
        assert_eq!(last.last(), Some(255));
    }

    #[test]
    fn ids_over_input_and_output_look_up_the_whole_input_blocks() {
        // Blocks of 16: 40 + 200 tokens are 15 ids, 100 + 60 are 10.
        let ids = |count: u64| {
            (0..count)
                .map(|id| id.to_string())
                .collect::<Vec<_>>()
                .join(",")
        };
        let text = format!(
            "{{\"timestamp\":0,\"input_length\":40,\"output_length\":200,\"hash_ids\":[{}]}}\n\
             {{\"timestamp\":1,\"input_length\":100,\"output_length\":60,\"hash_ids\":[{}]}}\n",
            ids(15),
            ids(10)
        );
        let trace = read(&text).unwrap();
        assert_eq!(
            (trace.block_tokens, trace.coverage),
            (16, Coverage::WholeBlocks)
        );
        assert_eq!(trace.requests[0].lookup_blocks, 2);
        let coarse = TraceOptions {
            coarsen: 4,
            ..TraceOptions::default()
        };
        let trace = Trace::read(text.as_bytes(), &coarse).unwrap();
        assert_eq!(trace.block_tokens, 64);
        assert_eq!(trace.requests[0].hash_ids, [3, 7, 11]);
        assert_eq!(trace.requests[1].hash_ids, [3, 7]);
        let lookups: Vec<_> = trace
            .requests
            .iter()
            .map(|request| request.lookup_blocks)
            .collect();
        assert_eq!(lookups, [0, 1]);
    }

    #[test]
    fn a_broken_line_is_named() {
        let check = |bad: &str, says: &str| {
            let error = read(&format!("{GOOD}\n{bad}\n{GOOD}\n"))
                .unwrap_err()
                .to_string();
            assert!(
                error.starts_with("line 2 of the trace is broken: "),
                "{error}"
            );
            assert!(error.contains(says), "{error} does not say {says}");
        };
        check(r#"{"timestamp": 27, "input_le"#, "EOF while parsing");
        check("not json", "expected ident (column 2)");
        check(
            r#"{"timestamp": 1, "input_length": 1, "output_length": 1}"#,
            "missing field `hash_ids`",
        );
        check(&GOOD.replace("1300", "-3"), "invalid value: integer `-3`");
        check(
            &GOOD.replace("[1, 2, 3]", "[1, \"x\"]"),
            "invalid type: string \"x\"",
        );
        check(&GOOD.replace("27", "-27"), "timestamp -27 is out of range");
        check(&GOOD.replace("27", "1e300"), "out of range");
        check(&format!("{GOOD} {GOOD}"), "trailing characters");
        check("(\u{b5}/\u{fd}", "column 1");
    }

    #[test]
    fn what_is_no_trace_is_said_to_be_none() {
        assert!(matches!(read("\n \n"), Err(TraceError::Empty)));
        let compressed = [0x28, 0xb5, 0x2f, 0xfd, 0, 0xff, b'\n', 7];
        let error = Trace::read(&compressed[..], &TraceOptions::default()).unwrap_err();
        assert!(error.to_string().contains("zstd"), "{error}");
        let endless = std::io::BufReader::new(std::io::repeat(b'['));
        let error = Trace::read(endless, &TraceOptions::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("longer than"), "{error}");
        let zero = TraceOptions {
            coarsen: 0,
            ..TraceOptions::default()
        };
        assert!(Trace::read(GOOD.as_bytes(), &zero).is_err());
    }

    #[test]
    fn a_block_size_that_cannot_be_told_is_asked_for() {
        let odd: String = [(1000, 3), (1000, 70), (1000, 900), (1000, 450)]
            .map(|(input, ids)| {
                let ids = vec!["1"; ids].join(",");
                format!(
                    "{{\"timestamp\":0,\"input_length\":{input},\"output_length\":0,\"hash_ids\":[{ids}]}}\n"
                )
            })
            .concat();
        let error = read(&odd).unwrap_err().to_string();
        assert!(error.contains("say it with --block-tokens"), "{error}");
        let given = TraceOptions {
            block_tokens: Some(100),
            ..TraceOptions::default()
        };
        let trace = Trace::read(odd.as_bytes(), &given).unwrap();
        assert_eq!(
            (trace.block_tokens, trace.block_tokens_guessed),
            (100, false)
        );
    }
}
