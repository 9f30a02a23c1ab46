//! Layer by layer between real processes: blocks that are read and written section by section, over
//! shared memory and TCP, from memory and from the device, while nodes and writers die.

mod support;

use kvar_base::{BlockId, MissReason, PutOutcome, Refusal};
use kvar_client::{
    CallOptions, Client, ClientConfig, Filled, GetItem, LayerGet, LayerItem, LayerPutItem,
    LinkChoice, PutHints, PutItem, PutSource, SectionRefused,
};
use kvar_node::KeyFile;
use std::io::Read as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use support::random::Random;
use support::{PATIENCE, Place, client, until};

const SECTION: u32 = 40_000;
const SECTIONS: usize = 12;
const LENGTHS: [u32; SECTIONS] = [SECTION; SECTIONS];

fn id(number: u32) -> BlockId {
    let mut bytes = [0x1a; 32];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockId::new(bytes)
}

fn section(block: u32, section: usize) -> Vec<u8> {
    Random::of(u64::from(block * 100 + section as u32)).bytes(SECTION as usize)
}

fn block(number: u32) -> Vec<Vec<u8>> {
    (0..SECTIONS).map(|at| section(number, at)).collect()
}

fn put(client: &Client, blocks: std::ops::Range<u32>) {
    for number in blocks {
        let item = PutItem {
            durable: true,
            ..PutItem::of_pieces(id(number), block(number))
        };
        assert_eq!(client.put(vec![item]), [PutOutcome::Stored], "{number}");
    }
}

fn get(client: &Client, blocks: std::ops::Range<u32>) -> LayerGet {
    let items = blocks.map(|number| LayerItem::to_vecs(id(number), &LENGTHS));
    client.submit_get_layers(items.collect(), CallOptions::default())
}

/// Every section, as it comes, is what was written.
fn reads_whole(layers: &LayerGet, first: u32) {
    for at in 0..SECTIONS {
        let misses = layers.wait_section(at, PATIENCE).unwrap();
        assert!(
            misses.iter().all(Option::is_none),
            "section {at}: {misses:?}"
        );
        let blocks = layers.take_section(at).unwrap();
        for (number, pieces) in (first..).zip(blocks) {
            let Filled::Bytes(bytes) = &pieces[0] else {
                panic!("{pieces:?}")
            };
            assert!(
                *bytes == section(number, at),
                "block {number}, section {at}"
            );
        }
    }
}

fn whole_is(client: &Client, number: u32) -> Result<(), MissReason> {
    let result = client.get(vec![GetItem::to_vec(id(number))]).remove(0);
    match result.miss() {
        None => {
            assert!(result.bytes() == Some(&block(number).concat()[..]));
            Ok(())
        }
        Some(reason) => Err(reason),
    }
}

#[test]
fn blocks_are_read_by_layers_from_memory_and_from_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let place = Place::new(dir.path()).with(&["--shards", "2"]);
    let server = place.serve();
    put(&client(&server, LinkChoice::Auto), 0..20);
    for link in [LinkChoice::Shm, LinkChoice::Tcp] {
        let client = client(&server, link);
        reads_whole(&get(&client, 0..20), 0);
        until("twenty hits", || client.stats().hits == 20);
    }
    assert_eq!(server.stop(), 0);
    // Cold: stretches of 256 KiB instead of twelve sections each.
    let server = place.serve();
    let client = client(&server, LinkChoice::Auto);
    let count = |name: &str| {
        let metrics = support::admin(&server, "/metrics");
        let of = |line: &str| {
            let value = line.strip_prefix(name)?.rsplit(' ').next()?;
            value.parse::<f64>().ok()
        };
        metrics.lines().filter_map(of).sum::<f64>()
    };
    reads_whole(&get(&client, 0..20), 0);
    // Pages of 4 KiB make twelve sections of ten pages: 7 of them are a stretch, so two reads a block
    // and some more until the layout is known.
    let reads = count("kvar_part_reads");
    assert!((40.0..60.0).contains(&reads), "{reads} reads of 20 blocks");
}

#[test]
fn a_node_that_is_killed_while_it_is_read_by_layers_ends_every_section() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let client = client(&server, LinkChoice::Auto);
    put(&client, 0..20);
    server.signal("-STOP");
    let layers = get(&client, 0..20);
    assert_eq!(layers.wait_section(0, Duration::from_millis(50)), None);
    let begun = Instant::now();
    server.kill();
    let misses = layers.wait_section(SECTIONS - 1, PATIENCE).unwrap();
    assert!(begun.elapsed() < PATIENCE / 4);
    assert!(misses.contains(&Some(MissReason::Unreachable)));
    let ends = layers.finish();
    assert!(ends.iter().all(Option::is_some), "{ends:?}");
}

// ---- puts ---------------------------------------------------------------------------------------

fn item(number: u32) -> LayerPutItem {
    LayerPutItem {
        id: id(number),
        lengths: LENGTHS.to_vec(),
        hints: PutHints::default(),
        durable: false,
    }
}

fn sources(blocks: &[u32], at: usize) -> Vec<Box<dyn PutSource>> {
    let source = |number: &u32| Box::new(section(*number, at)) as Box<dyn PutSource>;
    blocks.iter().map(source).collect()
}

#[test]
fn blocks_that_are_written_by_layers_are_there_at_the_commit_and_not_before() {
    for link in [LinkChoice::Shm, LinkChoice::Tcp] {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::new(dir.path()).with(&["--shards", "2"]);
        let server = place.serve();
        let (writer, reader) = (client(&server, link), client(&server, link));
        let blocks = [0, 1, 2, 3, 4];
        put(&reader, 3..4);
        let mut layers = writer.put_layers(blocks.map(item).to_vec(), CallOptions::default());
        assert_eq!(layers.sections(), SECTIONS);
        for at in 0..SECTIONS {
            let wrong = layers.section(at + 1, sources(&blocks, at));
            let (expected, found) = (at, at + 1);
            assert_eq!(wrong, Err(SectionRefused::Order { expected, found }));
            let wrong = layers.section(at, sources(&blocks[..4], at));
            assert!(matches!(
                wrong,
                Err(SectionRefused::Length {
                    block: 4,
                    found: 0,
                    ..
                })
            ));
            layers.section(at, sources(&blocks, at)).unwrap();
            assert_eq!(
                whole_is(&reader, 0),
                Err(MissReason::Absent),
                "section {at}"
            );
        }
        let stored = PutOutcome::Stored;
        let outcomes = layers.commit().wait();
        assert_eq!(
            outcomes,
            [stored, stored, stored, PutOutcome::Exists, stored]
        );
        for number in blocks {
            assert_eq!(whole_is(&reader, number), Ok(()));
        }
        reads_whole(&get(&reader, 0..5), 0);
        // They are blocks like any other: also after the node has come again.
        writer.flush(CallOptions::default()).unwrap();
        assert_eq!(server.stop(), 0);
        let server = place.serve();
        assert_eq!(whole_is(&client(&server, link), 4), Ok(()));
    }
}

#[test]
fn a_put_by_layers_that_is_not_committed_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let writer = client(&server, LinkChoice::Auto);
    let reader = client(&server, LinkChoice::Auto);
    let begin = |number: u32, count: usize, within: Duration| {
        let options = CallOptions::within(within);
        let mut layers = writer.put_layers(vec![item(number)], options);
        for at in 0..count {
            layers.section(at, sources(&[number], at)).unwrap();
        }
        layers
    };
    // Far beyond what is waited for below, so that no deadline does what a Cancel should.
    let long = 10 * PATIENCE;
    // Given up, dropped, committed too early, committed too late.
    begin(1, 5, long).abort();
    drop(begin(2, SECTIONS, long));
    let wrong = PutOutcome::Refused(Refusal::WrongFormat);
    assert_eq!(begin(3, 5, long).commit().wait(), [wrong]);
    let layers = begin(4, SECTIONS, Duration::from_millis(100));
    until("the deadline", || layers.is_done());
    let late = PutOutcome::Refused(Refusal::Deadline);
    assert_eq!(layers.commit().wait(), [late]);
    // Neither did the links break, nor is the writer thought to be gone.
    assert_eq!(writer.stats().links_lost, 0);
    for number in 1..=4 {
        assert_eq!(whole_is(&reader, number), Err(MissReason::Absent));
        // Nor does what was begun stand in the way of another.
        until("the id is free again", || {
            let put = PutItem::of_pieces(id(number), block(number));
            reader.put(vec![put]) == [PutOutcome::Stored]
        });
    }
    // A client that goes takes its puts along.
    let mut layers = begin(9, 3, long);
    layers.section(3, sources(&[9], 3)).unwrap();
    drop((layers, writer));
    until("the id is free again", || {
        reader.put(vec![PutItem::of_pieces(id(9), block(9))]) == [PutOutcome::Stored]
    });
}

#[test]
fn bytes_that_change_after_they_were_given_never_become_a_block() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let writer = client(&server, LinkChoice::Auto);
    let mut layers = writer.put_layers(vec![item(1)], CallOptions::default());
    for at in 0..SECTIONS {
        // The check is made of what is visited first, which is not what leaves.
        let lies = Box::new(Changing(
            section(1, at),
            std::sync::atomic::AtomicBool::new(at == 7),
        ));
        layers.section(at, vec![lies]).unwrap();
    }
    let wrong = PutOutcome::Refused(Refusal::WrongFormat);
    assert_eq!(layers.commit().wait(), [wrong]);
    assert_eq!(whole_is(&writer, 1), Err(MissReason::Absent));
}

/// Shows other bytes the first time, if told so.
struct Changing(Vec<u8>, std::sync::atomic::AtomicBool);

impl kvar_client::Source for Changing {
    fn visit<'a>(&'a self, visit: &mut dyn FnMut(&'a [u8])) {
        if self.1.swap(false, std::sync::atomic::Ordering::SeqCst) {
            visit(&self.0[1..]);
            visit(&self.0[..1]);
        } else {
            visit(&self.0);
        }
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

// ---- waiting for a writer -----------------------------------------------------------------------

fn waits(
    client: &Client,
    number: u32,
    deadline: Duration,
) -> kvar_client::Pending<Vec<kvar_client::GetResult>> {
    let options = CallOptions {
        wait_announced: true,
        ..CallOptions::within(deadline)
    };
    client.submit_get(vec![GetItem::to_vec(id(number))], options)
}

/// Whoever waits for it really waits.
fn is_announced(reader: &Client, number: u32) {
    until("the block is announced", || {
        let waited = waits(reader, number, Duration::from_millis(20)).wait();
        waited[0].miss() == Some(MissReason::Deadline)
    });
}

#[test]
fn a_reader_that_waits_is_woken_by_the_end_of_the_put_however_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let writer = client(&server, LinkChoice::Auto);
    let reader = client(&server, LinkChoice::Auto);
    let begin = |number: u32| {
        let mut layers = writer.put_layers(vec![item(number)], CallOptions::default());
        layers.section(0, sources(&[number], 0)).unwrap();
        is_announced(&reader, number);
        layers
    };
    // Nobody announced it: absent at once.
    let miss = waits(&reader, 1, PATIENCE).wait().remove(0).miss();
    assert_eq!(miss, Some(MissReason::Absent));
    // Its commit.
    let mut layers = begin(1);
    let waiting = waits(&reader, 1, PATIENCE);
    for at in 1..SECTIONS {
        layers.section(at, sources(&[1], at)).unwrap();
        assert!(!waiting.is_done());
    }
    assert_eq!(layers.commit().wait(), [PutOutcome::Stored]);
    let result = waiting.wait().remove(0);
    assert!(result.bytes() == Some(&block(1).concat()[..]), "{result:?}");
    // Its abort.
    let layers = begin(2);
    let waiting = waits(&reader, 2, PATIENCE);
    layers.abort();
    assert_eq!(waiting.wait().remove(0).miss(), Some(MissReason::Absent));
    // The reader's own deadline, long before the writer's.
    let layers = begin(3);
    let waiting = waits(&reader, 3, Duration::from_millis(80));
    assert_eq!(waiting.wait().remove(0).miss(), Some(MissReason::Deadline));
    drop(layers);
    // By layers, too.
    let mut layers = begin(4);
    let options = CallOptions {
        wait_announced: true,
        ..CallOptions::default()
    };
    let by_layers = reader.submit_get_layers(vec![LayerItem::to_vecs(id(4), &LENGTHS)], options);
    for at in 1..SECTIONS {
        layers.section(at, sources(&[4], at)).unwrap();
    }
    assert_eq!(by_layers.wait_section(0, Duration::from_millis(20)), None);
    assert_eq!(layers.commit().wait(), [PutOutcome::Stored]);
    reads_whole(&by_layers, 4);
}

/// Says to a test that it is the writer, and where the node is: its endpoint and its key file.
const WRITER: [&str; 2] = ["KVAR_TEST_ENDPOINT", "KVAR_TEST_KEY_FILE"];

/// The writer is a process of its own, so that it can be killed: this test once more, told that it is
/// the writer.
#[test]
fn a_reader_that_waits_for_a_writer_that_is_killed_is_told_at_once() {
    if let [Some(endpoint), Some(key_file)] = WRITER.map(std::env::var_os) {
        return begin_and_never_commit(endpoint.to_str().unwrap(), Path::new(&key_file));
    }
    let dir = tempfile::tempdir().unwrap();
    let server = Place::new(dir.path()).serve();
    let reader = client(&server, LinkChoice::Auto);
    let mut command = Command::new(std::env::current_exe().unwrap());
    let this_test = "a_reader_that_waits_for_a_writer_that_is_killed_is_told_at_once";
    command.args(["--exact", this_test, "--nocapture"]);
    command.env(WRITER[0], &server.endpoint);
    command.env(WRITER[1], &server.key_file);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut writer = command.spawn().unwrap();
    is_announced(&reader, 50);
    let waiting = waits(&reader, 50, PATIENCE);
    writer.kill().unwrap();
    assert_eq!(writer.wait().unwrap().signal(), Some(9), "it had ended");
    let begun = Instant::now();
    assert_eq!(waiting.wait().remove(0).miss(), Some(MissReason::Absent));
    assert!(begun.elapsed() < PATIENCE / 4, "{:?}", begun.elapsed());
}

/// The killed writer: half a put, until whoever started it is gone.
fn begin_and_never_commit(endpoint: &str, key_file: &Path) {
    let key = KeyFile::read(key_file).unwrap().key;
    let client = Client::connect(ClientConfig::new(endpoint, key)).unwrap();
    let mut layers = client.put_layers(vec![item(50)], CallOptions::within(PATIENCE));
    layers.section(0, sources(&[50], 0)).unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(layers);
}
