//! What is encoded is decoded, for any content.

use kvar_base::{BlockId, ContentCheck, MapEpoch, MissReason, PutOutcome, Refusal};
use kvar_wire::*;
use proptest::prelude::*;

fn ids() -> impl Strategy<Value = Vec<BlockId>> {
    prop::collection::vec(any::<[u8; 32]>().prop_map(BlockId::new), 0..50)
}

fn section() -> impl Strategy<Value = Section> {
    (any::<u32>(), any::<u64>()).prop_map(|(len, check)| Section {
        len,
        check: ContentCheck(check),
    })
}

fn miss() -> impl Strategy<Value = MissReason> {
    prop::sample::select(MissReason::ALL.to_vec())
}

fn item() -> impl Strategy<Value = GetItem> {
    let expected = prop_oneof![
        Just(Lengths::Any),
        any::<(u16, u32)>().prop_map(|(count, len)| Lengths::Equal(count, len)),
        prop::collection::vec(any::<u32>(), 0..40).prop_map(Lengths::Each),
    ];
    let range = prop::option::of(any::<(u16, u16)>().prop_map(|(start, end)| start..end));
    (
        any::<[u8; 32]>(),
        range,
        expected,
        any::<Option<u64>>(),
        any::<u32>(),
        any::<Option<(u64, u32)>>(),
    )
        .prop_map(|(id, sections, expected, version, depth, slot)| GetItem {
            id: BlockId::new(id),
            sections,
            expected,
            version,
            depth,
            slot: slot.map(|(at, bytes)| GetSlot { at, bytes }),
        })
}

fn message() -> impl Strategy<Value = Message> {
    let sections = || prop::collection::vec(section(), 0..70);
    let outcome = prop_oneof![
        Just(PutOutcome::Stored),
        Just(PutOutcome::Exists),
        Just(PutOutcome::InProgress),
        prop::sample::select(Refusal::ALL.to_vec()).prop_map(PutOutcome::Refused),
    ];
    let finished = prop_oneof![
        any::<u64>().prop_map(Finished::Done),
        Just(Finished::Deadline),
        Just(Finished::Overloaded),
        ".{0,200}".prop_map(Finished::Failed),
    ];
    prop_oneof![
        (
            "\\PC{0,60}",
            any::<[u8; 32]>(),
            "[ -~]{0,60}",
            any::<(u16, u16)>()
        )
            .prop_map(|(namespace, nonce, client, (oldest, newest))| {
                let versions = VersionRange { oldest, newest };
                Hello {
                    versions,
                    namespace,
                    nonce,
                    client,
                }
                .into()
            }),
        (ids(), any::<(bool, u32, u64, u64)>()).prop_map(|(ids, rest)| {
            let (leading_only, first_depth, touch_request, deadline_us) = rest;
            Lookup {
                ids,
                leading_only,
                first_depth,
                touch_request,
                deadline_us,
            }
            .into()
        }),
        (any::<u32>(), prop::option::of(miss()))
            .prop_map(|(count, why)| LookupAnswer::Leading(count, why).into()),
        prop::collection::vec(any::<bool>(), 0..100)
            .prop_map(|bits| LookupAnswer::Each(Bitmap::of(&bits)).into()),
        (
            prop::collection::vec(item(), 0..30),
            any::<(u64, u64, bool, bool)>()
        )
            .prop_map(
                |(items, (touch_request, deadline_us, by_layer, wait_announced))| {
                    Get {
                        items: items.into(),
                        touch_request,
                        deadline_us,
                        hints: GetHints {
                            by_layer,
                            wait_announced,
                        },
                    }
                    .into()
                }
            ),
        (any::<u16>(), sections()).prop_map(|(first, sections)| {
            let checks = sections.iter().map(|section| section.check).collect();
            Sections { first, checks }.into()
        }),
        (any::<[u8; 32]>(), sections(), any::<(u32, bool, u64)>()).prop_map(
            |(id, sections, (recompute_us, durable, deadline_us))| {
                Announce {
                    id: BlockId::new(id),
                    lengths: sections.iter().map(|section| section.len).collect(),
                    hints: PutHints::default(),
                    more_hints: MoreHints {
                        recompute_us,
                        ..MoreHints::default()
                    },
                    durable,
                    deadline_us,
                }
                .into()
            }
        ),
        Just(Commit {}.into()),
        (any::<u16>(), any::<u64>(), any::<u16>(), sections()).prop_map(
            |(item, version, first_section, sections)| {
                let outcome = GetOutcome::Hit {
                    version,
                    first_section,
                    sections,
                };
                GetAnswer { item, outcome }.into()
            }
        ),
        (any::<u16>(), miss()).prop_map(|(item, why)| GetAnswer {
            item,
            outcome: GetOutcome::Miss(why)
        }
        .into()),
        (
            any::<[u8; 32]>(),
            sections(),
            any::<(u32, u64, Option<u32>, bool, u8, u32, bool)>(),
            any::<(bool, u64)>()
        )
            .prop_map(|(id, sections, hints, (durable, deadline_us))| {
                let (depth, request, ttl_s, ephemeral, traffic_class, recompute_us, handover) =
                    hints;
                let hints = PutHints {
                    depth,
                    request,
                    ttl_s,
                    ephemeral,
                    traffic_class,
                    recompute_us,
                    handover,
                };
                Put {
                    id: BlockId::new(id),
                    sections,
                    hints,
                    durable,
                    deadline_us,
                }
                .into()
            }),
        outcome.prop_map(|outcome| PutAnswer { outcome }.into()),
        (ids(), any::<u64>()).prop_map(|(ids, deadline_us)| Remove { ids, deadline_us }.into()),
        finished.prop_map(|finished| RemoveAnswer { finished }.into()),
        "\\PC{0,300}".prop_map(|json| StatusAnswer { json }.into()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    #[test]
    fn decode_undoes_encode(message in message(), request: u64, epoch: u64, before: Vec<u8>) {
        let mut bytes = before.clone();
        message.encode(&mut bytes, request, MapEpoch(epoch), 0).unwrap();
        prop_assert_eq!(&bytes[..before.len()], &before[..]);
        let frame = &bytes[before.len()..];
        let header = Header::decode(frame.first_chunk().unwrap()).unwrap();
        prop_assert_eq!((header.request, header.epoch), (request, MapEpoch(epoch)));
        prop_assert_eq!(header.kind, message.kind());
        prop_assert_eq!(decode(&header, &frame[HEADER_BYTES..]).unwrap(), message);
    }

    #[test]
    fn bitmaps_keep_their_bits(bits in prop::collection::vec(any::<bool>(), 0..200)) {
        prop_assert_eq!(Bitmap::of(&bits).bits(bits.len()), bits.clone());
        prop_assert_eq!(&Bitmap::of(&bits).bits(bits.len() + 9)[bits.len()..], [false; 9]);
    }

    #[test]
    fn lengths_fit_themselves_and_nothing_else(
        lengths in prop::collection::vec(1_u32..4, 1..6),
        other in prop::collection::vec(1_u32..4, 1..6),
    ) {
        let expected = Lengths::of(&lengths);
        prop_assert!(expected.fit(lengths.iter().copied()));
        prop_assert_eq!(expected.fit(other.iter().copied()), lengths == other);
        prop_assert!(Lengths::Any.fit(other.iter().copied()));
    }
}
