//! One or more messages of every kind, fixed for ever: golden frames are made from them, fuzzing
//! starts from them.

use kvar_base::{BlockId, ContentCheck, LeaseToken, MissReason, Mode, PutOutcome, Refusal};
use kvar_wire::*;

/// (name of the golden file, message, length of the payload behind it)
pub(crate) type Sample = (&'static str, Message, usize);

/// What a version added; every version that is spoken has something here.
pub(crate) fn added_by(version: u16) -> Vec<Sample> {
    match version {
        1 => samples_of_version_1(),
        2 => samples_of_version_2(),
        3 => samples_of_version_3(),
        4 => samples_of_version_4(),
        5 => samples_of_version_5(),
        6 => samples_of_version_6(),
        version => panic!("version {version} has no samples; what did it add?"),
    }
}

/// Those of every version.
pub(crate) fn all() -> Vec<Sample> {
    (VERSIONS.oldest..=VERSIONS.newest)
        .flat_map(added_by)
        .collect()
}

fn samples_of_version_1() -> Vec<Sample> {
    let id = |n: u8| BlockId::new([n; 32]);
    let section = |n: u32| Section {
        len: 65_536 + n,
        check: ContentCheck(u64::from(n) << 40 | 7),
    };
    let hints = PutHints {
        depth: 17,
        request: 1 << 50,
        ttl_s: Some(3600),
        ephemeral: true,
        ..PutHints::default()
    };
    let item = |n: u8| GetItem {
        id: id(n),
        sections: None,
        expected: Lengths::Any,
        version: None,
        depth: u32::from(n),
        slot: None,
    };
    let part = GetItem {
        sections: Some(3..9),
        expected: Lengths::Equal(6, 65_536),
        version: Some(0xdead_beef_0000_0001),
        ..item(8)
    };
    let ragged = GetItem {
        expected: Lengths::Each(vec![1, 300, 70_000]),
        ..item(9)
    };
    let limits = Limits {
        block_bytes_max: 16 << 20,
        eager_bytes_max: 65_536,
        requests_max: 1024,
        bytes_max: 64 << 20,
    };
    let put = |sections: Vec<Section>, hints, durable| Put {
        id: id(4),
        sections,
        hints,
        durable,
        deadline_us: 999,
    };
    vec![
        (
            "hello",
            Hello {
                versions: VersionRange {
                    oldest: 1,
                    newest: 1,
                },
                namespace: "default".into(),
                nonce: [0xa5; 32],
                client: "kvar 0.1.0".into(),
            }
            .into(),
            0,
        ),
        (
            "challenge",
            Challenge {
                version: 1,
                nonce: [0x5a; 32],
                key_name: "3fe1c2aa".into(),
            }
            .into(),
            0,
        ),
        (
            "proof",
            Proof {
                proof: [9; 32],
                key_name: "3fe1c2aa".into(),
            }
            .into(),
            0,
        ),
        (
            "welcome",
            Welcome {
                node: "n1".into(),
                proof: [8; 32],
                limits,
                mode: None,
            }
            .into(),
            0,
        ),
        (
            "failure",
            Failure::new(FailureCode::Key, "wrong key, ключ").into(),
            0,
        ),
        (
            "lookup",
            Lookup {
                ids: vec![id(1), id(2), id(3)],
                leading_only: true,
                first_depth: 5,
                touch_request: 77,
                deadline_us: 20_000,
            }
            .into(),
            0,
        ),
        (
            "lookup_answer_leading",
            LookupAnswer::Leading(2, Some(MissReason::Absent)).into(),
            0,
        ),
        (
            "lookup_answer_each",
            LookupAnswer::Each(Bitmap::of(&[true, false, true])).into(),
            0,
        ),
        (
            "lookup_answer_miss",
            LookupAnswer::Miss(MissReason::Loading).into(),
            0,
        ),
        (
            "get",
            Get {
                items: vec![item(7), part, ragged].into(),
                touch_request: 78,
                deadline_us: 1_000_000,
                hints: GetHints::default(),
            }
            .into(),
            0,
        ),
        (
            "get_answer_hit",
            GetAnswer {
                item: 2,
                outcome: GetOutcome::Hit {
                    version: 42,
                    first_section: 3,
                    sections: vec![section(0), section(1)],
                },
            }
            .into(),
            131_073,
        ),
        (
            "get_answer_miss",
            GetAnswer {
                item: 1023,
                outcome: GetOutcome::Miss(MissReason::WrongFormat),
            }
            .into(),
            0,
        ),
        (
            "put_eager",
            put(vec![section(0)], PutHints::default(), false).into(),
            65_536,
        ),
        (
            "put_announced",
            put(vec![section(0), section(5)], hints, true).into(),
            0,
        ),
        (
            "put_answer_stored",
            PutAnswer {
                outcome: PutOutcome::Stored,
            }
            .into(),
            0,
        ),
        (
            "put_answer_refused",
            PutAnswer {
                outcome: PutOutcome::Refused(Refusal::Busy),
            }
            .into(),
            0,
        ),
        ("pull", Pull {}.into(), 0),
        ("payload", Payload {}.into(), 131_077),
        (
            "remove",
            Remove {
                ids: vec![id(6)],
                deadline_us: 5,
            }
            .into(),
            0,
        ),
        (
            "remove_answer",
            RemoveAnswer {
                finished: Finished::Done(1),
            }
            .into(),
            0,
        ),
        ("flush", Flush { deadline_us: 6 }.into(), 0),
        (
            "flush_answer",
            FlushAnswer {
                finished: Finished::Failed("disk".into()),
            }
            .into(),
            0,
        ),
        ("purge", Purge { deadline_us: 7 }.into(), 0),
        (
            "purge_answer",
            PurgeAnswer {
                finished: Finished::Deadline,
            }
            .into(),
            0,
        ),
        (
            "stat",
            Stat {
                id: id(3),
                deadline_us: 8,
            }
            .into(),
            0,
        ),
        (
            "stat_answer",
            StatAnswer {
                stat: Ok(BlockStat {
                    bytes: 131_072,
                    sections: Some(SectionLengths(vec![65_536, 65_536])),
                    version: Some(3),
                    in_dram: true,
                    on_flash: false,
                    flushed: false,
                    age_s: Some(60),
                    expires_unix_s: Some(2_000_000_000),
                }),
            }
            .into(),
            0,
        ),
        (
            "stat_answer_none",
            StatAnswer {
                stat: Err(MissReason::Removed),
            }
            .into(),
            0,
        ),
        ("status", Status {}.into(), 0),
        (
            "status_answer",
            StatusAnswer {
                json: "{\"ready\":true}".into(),
            }
            .into(),
            0,
        ),
        ("cancel", Cancel {}.into(), 0),
        ("ping", Ping {}.into(), 0),
        ("pong", Pong {}.into(), 0),
    ]
}

/// What version 2 added.
fn samples_of_version_2() -> Vec<Sample> {
    let token = LeaseToken::new([0x7e; 16]);
    let answer = |leading, reason, lasts_ms| LeaseAnswer {
        leading,
        reason,
        lasts_ms,
    };
    vec![
        (
            "lease",
            Lease {
                ids: vec![BlockId::new([1; 32]), BlockId::new([2; 32])],
                first_depth: 5,
                touch_request: 77,
                token,
                client: 1 << 40,
                ttl_ms: 2000,
                deadline_us: 20_000,
            }
            .into(),
            0,
        ),
        (
            "lease_answer",
            answer(1, Some(MissReason::Overloaded), 2000).into(),
            0,
        ),
        ("lease_answer_all", answer(2, None, 30_000).into(), 0),
        (
            "renew",
            Renew {
                token,
                ttl_ms: 30_000,
                deadline_us: 9,
            }
            .into(),
            0,
        ),
        ("renew_answer", RenewAnswer { lasts_ms: 0 }.into(), 0),
        (
            "release",
            Release {
                token,
                deadline_us: 10,
            }
            .into(),
            0,
        ),
        ("release_answer", ReleaseAnswer { released: true }.into(), 0),
    ]
}

/// What version 3 added.
fn samples_of_version_3() -> Vec<Sample> {
    let put = |hints| Put {
        id: BlockId::new([4; 32]),
        sections: vec![Section {
            len: 65_536,
            check: ContentCheck(7),
        }],
        hints,
        durable: false,
        deadline_us: 999,
    };
    let all = PutHints {
        depth: 17,
        request: 1 << 50,
        ttl_s: None,
        ephemeral: false,
        traffic_class: 200,
        recompute_us: 1_500_000,
        handover: true,
    };
    let one = PutHints {
        handover: true,
        ..PutHints::default()
    };
    vec![
        ("put_hints", put(all).into(), 65_536),
        ("put_handover", put(one).into(), 0),
    ]
}

/// What version 4 added.
fn samples_of_version_4() -> Vec<Sample> {
    let attach = Attach {
        place: [0x11; 16],
        secret: [0x77; 16],
    };
    let attached = AttachAnswer::Attached {
        ring_bytes: 1 << 20,
    };
    let declined = AttachAnswer::declined(AttachDeclined::Full, "as many as may");
    vec![
        ("attach", attach.into(), 0),
        ("attach_answer", attached.into(), 0),
        ("attach_answer_declined", declined.into(), 0),
    ]
}

/// What version 5 added.
fn samples_of_version_5() -> Vec<Sample> {
    let get = |by_layer, wait_announced| Get {
        items: vec![GetItem {
            id: BlockId::new([7; 32]),
            sections: Some(3..4),
            expected: Lengths::Equal(1, 65_536),
            version: Some(42),
            depth: 9,
            slot: None,
        }]
        .into(),
        touch_request: 78,
        deadline_us: 1_000_000,
        hints: GetHints {
            by_layer,
            wait_announced,
        },
    };
    let announce = Announce {
        id: BlockId::new([4; 32]),
        lengths: vec![65_536, 65_536, 70],
        hints: PutHints {
            depth: 17,
            request: 1 << 50,
            ttl_s: Some(3600),
            ephemeral: true,
            ..PutHints::default()
        },
        more_hints: MoreHints {
            traffic_class: 200,
            recompute_us: 1_500_000,
            handover: true,
        },
        durable: true,
        deadline_us: 999,
    };
    let sections = Sections {
        first: 1,
        checks: vec![ContentCheck(7), ContentCheck(1 << 60)],
    };
    let welcome = Welcome {
        node: "n1".into(),
        proof: [8; 32],
        limits: Limits {
            block_bytes_max: 16 << 20,
            eager_bytes_max: 65_536,
            requests_max: 1024,
            bytes_max: 256 << 20,
        },
        mode: Some(Mode::Observe),
    };
    let switch = |mode| Switch { mode };
    vec![
        ("welcome_mode", welcome.into(), 0),
        ("switch_off", switch(Mode::Off).into(), 0),
        ("switch_load", switch(Mode::Load).into(), 0),
        ("get_by_layer", get(true, false).into(), 0),
        ("get_waiting", get(false, true).into(), 0),
        ("announce", announce.into(), 0),
        ("sections", sections.into(), 65_606),
        ("commit", Commit {}.into(), 0),
    ]
}

/// What version 6 added.
fn samples_of_version_6() -> Vec<Sample> {
    let item = |slot| GetItem {
        id: BlockId::new([7; 32]),
        sections: None,
        expected: Lengths::Equal(1, 65_536),
        version: None,
        depth: 9,
        slot,
    };
    let slot = |at| Some(GetSlot { at, bytes: 65_536 });
    let get = |slots: &[Option<GetSlot>], by_layer| Get {
        items: slots.iter().map(|slot| item(*slot)).collect(),
        touch_request: 78,
        deadline_us: 1_000_000,
        hints: GetHints {
            by_layer,
            wait_announced: false,
        },
    };
    let stage = Stage {
        place: [0x11; 16],
        secret: [0x77; 16],
        bytes: 64 << 20,
    };
    let declined = StageAnswer::declined(AttachDeclined::Full, "as much as may be");
    let placed = GetAnswer {
        item: 1,
        outcome: GetOutcome::Placed {
            version: 3,
            first_section: 2,
            sections: vec![Section {
                len: 65_536,
                check: ContentCheck(7),
            }],
        },
    };
    vec![
        ("stage", stage.into(), 0),
        (
            "stage_answer",
            StageAnswer::Staged { bytes: 64 << 20 }.into(),
            0,
        ),
        ("stage_answer_declined", declined.into(), 0),
        (
            "get_placed",
            get(&[slot(0), None, slot(1 << 33)], false).into(),
            0,
        ),
        ("get_placed_by_layer", get(&[slot(70)], true).into(), 0),
        ("get_answer_placed", placed.into(), 0),
    ]
}
