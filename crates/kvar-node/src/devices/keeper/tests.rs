//! The keeper with real devices and engines, and a test in the place of the thread that has them: it
//! says when an engine hears what.

use super::leaving::{SURVEY_AGAIN, SURVEYS_MAX};
use super::{Command, Event, Keeper, KeeperParts, Live};
use crate::config::{Config, DataPath};
use crate::devices::surveyor::Said;
use crate::devices::{Note, Removal, Removed, Views};
use crate::mail::{Answer, Ask, EngineKey, KEEPER, Mail, Mailbox, Origin, Post, Ticket};
use crate::owner::Owner;
use crate::storage::{Storage, device_over};
use kvar_base::{
    BlockId, ByteSize, Clock as _, ContentCheck, MissReason, Moment, NamespaceKey, PutOutcome,
    Refusal, SystemClock,
};
use kvar_engine::{GetRequest, PutHints, PutRequest, ReadHints, Shares, Touch, survey_segments};
use kvar_io::{Arena, Bell, IoEngine, Reactor};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Long enough for a machine that compiles beside the test.
const PATIENCE: Duration = Duration::from_secs(30);
const LEN: usize = 5000;

/// The thread number of the test's own asks.
const TEST: u32 = 7;

struct Bench {
    keeper: Keeper,
    owners: Vec<Owner>,
    mailbox: Mailbox,
    post: Post,
    clock: SystemClock,
    next: u64,
    answers: HashMap<u64, Answer>,
    reactor: Reactor,
    // Last: files outlive who has them open.
    _dir: tempfile::TempDir,
}

impl Bench {
    /// A store of two devices, loaded; of one shard each, on one thread.
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| DataPath {
            path: dir.path().join(name),
            size: None,
            tier: None,
        };
        let mut config = Config {
            data: vec![path("a"), path("b")],
            size: Some(ByteSize(96 << 20)),
            dram: ByteSize(48 << 20),
            ..Config::default()
        };
        config.set("shards", "1").unwrap();
        let clock = SystemClock::default();
        let storage = Storage::open(&config, &clock).unwrap();
        let reactor = Reactor::new(config.io_engine).unwrap().0;
        let (post, mut boxes) = Post::new(vec![Bell::new().unwrap()]);
        let (sender, receiver) = crossbeam_channel::unbounded();
        let parts = KeeperParts {
            config,
            shares: Shares::default(),
            storage,
            post: post.clone(),
            views: Arc::new(Views::default()),
            clock,
            hook: None,
            moving: None,
            wall_clock: Arc::new(move || clock.unix_seconds()),
            block_bytes_max: 1 << 20,
            started: crossbeam_channel::bounded(1).0,
        };
        let mut bench = Self {
            keeper: Keeper::new(parts, sender, receiver),
            owners: Vec::new(),
            mailbox: boxes.remove(0),
            post,
            clock,
            next: 0,
            answers: HashMap::new(),
            reactor,
            _dir: dir,
        };
        bench.until("both are online", |it| it.keeper.started.is_none());
        bench
    }

    /// One turn of everybody.
    fn turn(&mut self) {
        let now = self.clock.now();
        while let Some(mail) = self.mailbox.take() {
            self.deliver(mail);
        }
        let mut answers = Vec::new();
        for owner in &mut self.owners {
            owner.turn(now, &mut answers);
            if owner.is_gone_now(now) {
                let _ = self.keeper.sender.send(Event::Closed(owner.key));
            }
        }
        self.take(answers);
        let turned = self.reactor.turn(Some(Duration::ZERO), &mut Vec::new());
        turned.unwrap();
        while let Ok(event) = self.keeper.receiver.try_recv() {
            self.keeper.on_event(event);
        }
        self.keeper.move_blocks(now);
    }

    fn deliver(&mut self, mail: Mail) {
        let now = self.clock.now();
        let mut answers = Vec::new();
        match mail {
            Mail::Open(shard) => {
                let (key, device, number) = (shard.key, shard.device, shard.number);
                let progress = shard.progress.clone();
                let opened = shard.begin(&self.post, &self.reactor).unwrap();
                let owner = Owner::loading(key, device, number, opened, progress);
                self.owners.push(owner);
            }
            Mail::Loaded(key, loaded) => {
                let loaded = loaded.unwrap();
                self.owner(key).start(now, *loaded);
                let _ = self.keeper.sender.send(Event::Loaded(key, Ok(())));
            }
            Mail::Ask(origin, key, ask) => self.owner(key).ask(now, origin, ask, &mut answers),
            Mail::Seal(key, is_sealed) => self.owner(key).seal(is_sealed),
            Mail::Close(key, has_moved) => self.owner(key).close(now, has_moved, &mut answers),
            Mail::Answer(operation, answer) => drop(self.answers.insert(operation, answer)),
            _ => {}
        }
        self.take(answers);
    }

    fn take(&mut self, answers: Vec<(Origin, Answer)>) {
        for (origin, answer) in answers {
            if origin.thread == KEEPER {
                let event = Event::Answered(origin.operation, answer);
                let _ = self.keeper.sender.send(event);
            } else {
                self.answers.insert(origin.operation, answer);
            }
        }
    }

    fn owner(&mut self, key: EngineKey) -> &mut Owner {
        let found = self.owners.iter_mut().find(|it| it.key == key);
        found.expect("an engine that is open")
    }

    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !is_so(self) {
            assert!(Instant::now() < until, "it does not come: {what}");
            self.turn();
            std::thread::yield_now();
        }
    }

    /// Asks an engine now, whatever lies in its mailbox.
    fn begin(&mut self, key: EngineKey, ask: Ask) -> u64 {
        self.next += 1;
        let (thread, operation) = (TEST, self.next);
        let origin = Origin { thread, operation };
        self.deliver(Mail::Ask(origin, key, ask));
        operation
    }

    fn ask(&mut self, key: EngineKey, ask: Ask) -> Answer {
        let operation = self.begin(key, ask);
        self.until("an answer", |it| it.answers.contains_key(&operation));
        self.answers.remove(&operation).unwrap()
    }

    fn begin_put(&mut self, key: EngineKey, id: BlockId) -> Result<Ticket, PutOutcome> {
        let bytes = bytes_of(&id);
        let begun = self.ask(
            key,
            Ask::PutBegin(PutRequest {
                id,
                sections: vec![(LEN as u32, ContentCheck::of(&bytes, &id, 0))],
                hints: PutHints::default(),
                durable: true,
                deadline: Moment(u64::MAX),
            }),
        );
        let Answer::PutBegun(begun) = begun else {
            panic!("another answer")
        };
        begun.map(|mut it| {
            let place = it.ticket.section_range(0);
            it.ticket.buffer_mut()[place].copy_from_slice(&bytes);
            it
        })
    }

    fn put(&mut self, key: EngineKey, id: BlockId) {
        let ticket = self.begin_put(key, id).unwrap().ticket;
        let Answer::Put(PutOutcome::Stored) = self.ask(key, Ask::PutCommit(ticket)) else {
            panic!("it is not stored")
        };
    }

    fn remove(&mut self, key: EngineKey, ids: &[BlockId]) {
        let Answer::Done(Ok(_)) = self.ask(key, Ask::Remove(ids.to_vec())) else {
            panic!("it is not removed")
        };
    }

    fn has(&mut self, key: EngineKey, id: BlockId) -> bool {
        let request = GetRequest {
            id,
            sections: None,
            deadline: Moment(u64::MAX),
            touch: Touch::NONE,
        };
        match self.ask(key, Ask::Get(request, ReadHints::default())) {
            Answer::Get(Ok(_)) => true,
            Answer::Get(Err(MissReason::Absent)) => false,
            _ => panic!("another answer"),
        }
    }

    fn engine(&self, at: usize) -> EngineKey {
        self.keeper.lives[at].engines[0]
    }

    /// The second device begins to leave.
    fn retire(&mut self) {
        let (reply, _) = tokio::sync::oneshot::channel();
        let command = Command::Retire {
            device: "1".to_owned(),
            now: false,
            rate: Some(1 << 40),
        };
        self.keeper.on_command(command, reply);
        assert!(self.keeper.lives[1].leaving.is_some());
    }

    fn until_gone(&mut self) {
        self.until("it has left", |it| it.keeper.lives.len() == 1);
    }
}

fn leaving(live: &Live) -> &super::Leaving {
    live.leaving.as_ref().expect("a device that leaves")
}

fn bytes_of(id: &BlockId) -> Vec<u8> {
    (0..LEN).map(|at| id.as_bytes()[at % 32]).collect()
}

fn ids(count: u32) -> Vec<BlockId> {
    let key = NamespaceKey::new([9; 32]);
    let name = |number| BlockId::from_name(&key, &format!("block {number}"));
    (0..count).map(name).collect()
}

/// Engines were asked first and the keeper last: a move that began and ended between put the block
/// where the remove had been already.
#[test]
fn a_block_that_moved_between_two_engines_of_one_remove_came_back() {
    let mut bench = Bench::new();
    let (a, b) = (bench.engine(0), bench.engine(1));
    let ids = ids(3);
    ids.iter().for_each(|id| bench.put(b, *id));
    bench.retire();
    let gone = &ids[1..2];
    let removal = Removal::begin(&bench.keeper.sender, Removed::blocks(gone));
    bench.remove(a, gone);
    // All that may move does.
    bench.until("the others have moved", |it| {
        leaving(&it.keeper.lives[1]).moved().blocks == 2
            && leaving(&it.keeper.lives[1]).held.len() == 1
    });
    bench.remove(b, gone);
    let (thread, operation) = (0, u64::MAX);
    let origin = Origin { thread, operation };
    let _ = bench.keeper.sender.send(Event::Note(origin, Note::Removal));
    bench.until("the remove is acknowledged", |it| {
        it.answers.contains_key(&operation)
    });
    drop(removal);
    bench.until_gone();
    let there: Vec<bool> = ids.iter().map(|id| bench.has(a, *id)).collect();
    assert_eq!(there, [true, false, true]);
}

/// A link that dies in the middle of its remove must not hold a device for ever.
#[test]
fn a_remove_that_nobody_ends_holds_nothing_up() {
    let mut bench = Bench::new();
    let (a, b) = (bench.engine(0), bench.engine(1));
    let ids = ids(2);
    ids.iter().for_each(|id| bench.put(b, *id));
    bench.retire();
    let removal = Removal::begin(&bench.keeper.sender, Removed::blocks(&ids));
    bench.until("both are held", |it| {
        leaving(&it.keeper.lives[1]).held.len() == 2
    });
    drop(removal);
    bench.until_gone();
    assert!(ids.iter().all(|id| bench.has(a, *id)));
}

/// Every remove spoiled every move, which cost each a try and all a pause.
#[test]
fn removes_of_other_blocks_cost_a_move_its_tries() {
    let mut bench = Bench::new();
    let b = bench.engine(1);
    let ids = ids(2);
    bench.put(b, ids[0]);
    bench.retire();
    bench.until("it moves", |it| {
        !leaving(&it.keeper.lives[1]).moves.is_empty()
    });
    // Past looking, so that a remove of its own would spoil it.
    let is_reading = |it: &Bench| {
        let mut moves = leaving(&it.keeper.lives[1]).moves.values();
        moves.all(|it| !matches!(it.step, super::moves::Step::Looking))
    };
    bench.until("it is read", is_reading);
    let keeper = &mut bench.keeper;
    keeper.removal_begins(u64::MAX, Removed::blocks(&ids[1..]));
    assert!(
        leaving(&keeper.lives[1])
            .moves
            .values()
            .all(|it| !it.is_spoiled)
    );
    keeper.removal_begins(u64::MAX - 1, Removed::blocks(&ids[..1]));
    let moves = leaving(&keeper.lives[1]).moves.values();
    assert!(moves.clone().count() == 1 && moves.clone().all(|it| it.is_spoiled));
    bench.until("it is held", |it| {
        leaving(&it.keeper.lives[1]).held.len() == 1
    });
    let left = leaving(&bench.keeper.lives[1]);
    assert_eq!(left.held[0].tries, 0, "a remove is no failed try");
    assert!(
        left.not_before <= bench.clock.now(),
        "and no reason to wait"
    );
    bench.keeper.removal_ends(u64::MAX);
    bench.keeper.removal_ends(u64::MAX - 1);
    bench.until_gone();
}

/// A put that was under way counted as a block that is there, and then it was given up.
#[test]
fn a_block_was_lost_because_somebody_had_begun_to_put_it() {
    let mut bench = Bench::new();
    let (a, b) = (bench.engine(0), bench.engine(1));
    let id = ids(1)[0];
    bench.put(b, id);
    let ticket = bench.begin_put(a, id).unwrap().ticket;
    bench.retire();
    // Looked at, read, refused, and in line again.
    let was_refused = |it: &Bench| leaving(&it.keeper.lives[1]).not_before > it.clock.now();
    bench.until("it is refused", was_refused);
    bench.begin(a, Ask::PutAbort(ticket));
    bench.until_gone();
    assert!(bench.has(a, id));
}

/// A thread that had not heard of the new routes, or had room already, committed at the old engine
/// behind its flush: acknowledged, and lost with the device.
#[test]
fn a_put_was_lost_that_was_acknowledged_after_the_routes_had_changed() {
    let mut bench = Bench::new();
    let (a, b) = (bench.engine(0), bench.engine(1));
    let ids = ids(4);
    bench.put(b, ids[0]);
    let before = bench.begin_put(b, ids[1]).unwrap().ticket;
    let late = bench.begin_put(b, ids[2]).unwrap().ticket;
    bench.retire();
    let Answer::Put(PutOutcome::Stored) = bench.ask(b, Ask::PutCommit(before)) else {
        panic!("until the switch it takes what comes")
    };
    // The flush lies behind the seal, so whoever has seen its answer has seen that.
    let is_last = |it: &Bench| leaving(&it.keeper.lives[1]).is_flushed();
    bench.until("the old engine is flushed", is_last);
    let busy = PutOutcome::Refused(Refusal::Busy);
    let Answer::Put(outcome) = bench.ask(b, Ask::PutCommit(late)) else {
        panic!("another answer")
    };
    assert_eq!(outcome, busy);
    assert_eq!(bench.begin_put(b, ids[3]).err(), Some(busy));
    bench.until_gone();
    let there: Vec<bool> = ids.iter().map(|id| bench.has(a, *id)).collect();
    assert_eq!(there, [true, true, false, false]);
}

/// The others went while its blocks were moving: it stays, and takes blocks again.
#[test]
fn a_device_that_stays_after_all_takes_blocks_again() {
    let mut bench = Bench::new();
    let b = bench.engine(1);
    let id = ids(1)[0];
    bench.retire();
    let is_last = |it: &Bench| leaving(&it.keeper.lives[1]).is_flushed();
    bench.until("the old engine is flushed", is_last);
    bench.keeper.take_out(0, "failed", "a test says so");
    bench.until("the other is gone", |it| it.keeper.lives.len() == 1);
    assert!(bench.keeper.lives[0].leaving.is_none());
    bench.put(b, id);
    assert!(bench.has(b, id));
}

/// Five surveys that failed counted as one that had found nothing: the device was retired, and none
/// of its blocks counted as lost.
#[test]
fn a_device_that_could_not_be_read_was_retired_as_if_it_were_empty() {
    let mut bench = Bench::new();
    let b = bench.engine(1);
    let id = ids(1)[0];
    bench.put(b, id);
    bench.retire();
    let uuid = bench.keeper.lives[1].uuid;
    let device = bench.keeper.lives[1].number;
    for left in (0..SURVEYS_MAX).rev() {
        let keeper = &mut bench.keeper;
        let survey = leaving(&keeper.lives[1]).survey;
        let failed = || Said::Failed("a test says so".to_owned());
        keeper.on_surveyed(device, survey, failed());
        if left > 0 {
            // Not at once: what is short of memory is so a moment later, too.
            let now = keeper.clock.now();
            keeper.move_blocks(now);
            assert_eq!(leaving(&keeper.lives[1]).survey, survey);
            keeper.move_blocks(now.after(SURVEY_AGAIN));
            assert!(leaving(&keeper.lives[1]).survey > survey);
            // What the last one says late is nobody's.
            keeper.on_surveyed(device, survey, failed());
        }
    }
    assert!(bench.keeper.lives[1].leaving.is_none());
    assert!(!bench.keeper.table.find(uuid).unwrap().leaving);
    let view = bench.keeper.view_of(uuid).unwrap();
    assert_eq!(view.state, "online");
    let reason = view.reason.unwrap();
    assert!(reason.contains("a test says so"), "{reason}");
    assert!(bench.has(b, id));
    // Once it can be read it leaves.
    bench.retire();
    assert_eq!(bench.keeper.view_of(uuid).unwrap().reason, None);
    bench.until_gone();
    let a = bench.engine(0);
    assert!(bench.has(a, id));
}

/// Segments that nobody could read were passed over without a word.
#[test]
fn what_was_passed_over_did_not_count_as_lost() {
    let mut bench = Bench::new();
    let b = bench.engine(1);
    bench.put(b, ids(1)[0]);
    bench.retire();
    let device = bench.keeper.lives[1].number;
    let survey = leaving(&bench.keeper.lives[1]).survey;
    let (segments, unreadable) = (0, 2);
    let said = Said::Begun {
        segments,
        unreadable,
    };
    bench.keeper.on_surveyed(device, survey, said);
    let moved = leaving(&bench.keeper.lives[1]).moved();
    assert_eq!((moved.unreadable_segments, moved.is_all()), (2, false));
    bench.until_gone();
    let now = bench.clock.now();
    assert!(bench.owner(b).report(now).lost_blocks > 0);
}

/// The keeper waited for a thread that read every header of a device that hangs at each.
#[test]
fn a_survey_that_nobody_wanted_any_more_read_on() {
    let bench = Bench::new();
    let live = &bench.keeper.lives[1];
    let arena = Arena::new(1 << 20).unwrap();
    let mut device = device_over(&live.target, &arena, IoEngine::Threads).unwrap();
    let asked = std::cell::Cell::new(0);
    let goes_on = || {
        asked.set(asked.get() + 1);
        asked.get() <= 2
    };
    assert!(live.superblock.segments_per_shard > 3);
    survey_segments(&mut *device, &arena, &live.superblock, &goes_on).unwrap();
    assert_eq!(asked.get(), 3);
}

/// The last round read from the newest segment on, and a shard has several open at a time: what was
/// put into an older one during the first round was lost.
#[test]
fn a_put_into_an_open_segment_that_had_been_read_was_lost() {
    let mut bench = Bench::new();
    let (a, b) = (bench.engine(0), bench.engine(1));
    let ids = ids(2);
    bench.put(b, ids[0]);
    bench.retire();
    bench.until("all segments are read", |it| {
        let moved = leaving(&it.keeper.lives[1]).moved();
        moved.segments > 0 && moved.segments_done == moved.segments
    });
    assert!(!leaving(&bench.keeper.lives[1]).has_left());
    let ticket = bench.begin_put(b, ids[1]).unwrap().ticket;
    let operation = bench.begin(b, Ask::PutCommit(ticket));
    bench.until_gone();
    let stored = matches!(
        bench.answers.get(&operation),
        Some(Answer::Put(PutOutcome::Stored))
    );
    assert_eq!(bench.has(a, ids[1]), stored);
    assert!(bench.has(a, ids[0]));
}
