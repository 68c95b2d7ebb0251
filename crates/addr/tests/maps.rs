//! Both containers against a naive model that scans a vector.

use lockstep_addr::{IntervalTree, Iova, OverlapError, Span, SpanMap};
use proptest::prelude::*;

const ROOM: u64 = 200;

fn span(start: u64, last: u64) -> Span<Iova> {
    Span::of(Iova::new(start), Iova::new(last))
}

fn any_span() -> impl Strategy<Value = Span<Iova>> {
    (0..ROOM, 0..30_u64, any::<u8>()).prop_map(|(start, len, edge)| match edge {
        0 => span(0, start),
        1 => span(u64::MAX - start, u64::MAX),
        _ => span(start, start + len),
    })
}

#[derive(Clone, Debug)]
enum Step {
    Insert(Span<Iova>, u8),
    Remove(usize),
    Set(Span<Iova>, u8),
    Clear(Span<Iova>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (any_span(), 0..3_u8).prop_map(|(s, v)| Step::Insert(s, v)),
        1 => any::<usize>().prop_map(Step::Remove),
        3 => (any_span(), 0..3_u8).prop_map(|(s, v)| Step::Set(s, v)),
        1 => any_span().prop_map(Step::Clear),
    ];
    prop::collection::vec(step, 1..80)
}

/// Ascending entries that never overlap.
#[derive(Default)]
struct Model(Vec<(Span<Iova>, u8)>);

impl Model {
    fn clear(&mut self, hole: Span<Iova>) {
        self.0 = self.0.iter().flat_map(|(s, v)| s.without(hole).into_iter().flatten().map(|part| (part, *v))).collect();
    }

    fn add(&mut self, span: Span<Iova>, value: u8) {
        self.0.push((span, value));
        self.0.sort();
    }

    fn set(&mut self, span: Span<Iova>, value: u8) {
        // At the ends of the space nothing can stick out, so there an entry as long as the span counts too.
        let inner = Span::new(span.start().max(Iova::new(1)), span.last().min(Iova::new(u64::MAX - 1)));
        if self.0.iter().any(|(s, v)| *v == value && s.covers(span) && (*s != span || inner != Some(span))) {
            return;
        }
        let mut whole = span;
        for (s, v) in &self.0 {
            if *v == value && (s.touches(span) || span.touches(*s) || s.overlaps(span)) {
                whole = Span::of(whole.start().min(s.start()), whole.last().max(s.last()));
            }
        }
        self.clear(whole);
        self.add(whole, value);
    }
}

fn compare(map: &SpanMap<Iova, u8>, model: &Model, probe: Span<Iova>) -> Result<(), TestCaseError> {
    let all: Vec<_> = map.iter().map(|(s, v)| (s, *v)).collect();
    prop_assert_eq!(&all, &model.0);
    prop_assert_eq!(map.len(), model.0.len());
    let over: Vec<_> = map.overlapping(probe).map(|(s, v)| (s, *v)).collect();
    let expected: Vec<_> = model.0.iter().copied().filter(|(s, _)| s.overlaps(probe)).collect();
    prop_assert_eq!(map.overlaps(probe), !expected.is_empty());
    prop_assert_eq!(over, expected);
    let at = probe.start();
    let own = |found: Option<(Span<Iova>, &u8)>| found.map(|(s, v)| (s, *v));
    prop_assert_eq!(own(map.get(at)), model.0.iter().copied().find(|(s, _)| s.contains(at)));
    prop_assert_eq!(own(map.first_at_or_after(at)), model.0.iter().copied().find(|(s, _)| s.start() >= at));
    prop_assert_eq!(own(map.last_before(at)), model.0.iter().copied().rfind(|(s, _)| s.start() < at));

    let mut next = Some(probe.start());
    let mut gaps = Vec::new();
    for (piece, value) in map.runs(probe) {
        prop_assert_eq!(Some(piece.start()), next);
        next = Some(piece.last()).filter(|last| *last < probe.last()).map(|last| Iova::new(last.get() + 1));
        match value {
            Some(value) => prop_assert!(model.0.iter().any(|(s, v)| s.covers(piece) && v == value)),
            None => {
                prop_assert!(!model.0.iter().any(|(s, _)| s.overlaps(piece)));
                gaps.push(piece);
            }
        }
    }
    prop_assert_eq!(next, None);
    for min_len in [1, 3, 8, 50] {
        let mut shown = Vec::new();
        prop_assert_eq!(
            map.first_gap(probe, min_len, |gap| {
                shown.push(gap);
                None
            }),
            None
        );
        prop_assert_eq!(&shown, &gaps.iter().copied().filter(|gap| gap.len() >= min_len).collect::<Vec<_>>());
        prop_assert_eq!(map.first_gap(probe, min_len, |gap| Some(gap.last())), shown.first().map(|gap| gap.last()));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn span_map(steps in steps(), probes in prop::collection::vec(any_span(), 80)) {
        let (mut map, mut model) = (SpanMap::new(), Model::default());
        for (step, probe) in steps.into_iter().zip(probes) {
            match step {
                Step::Insert(span, value) => match map.insert(span, value) {
                    Ok(()) => {
                        prop_assert!(!model.0.iter().any(|(s, _)| s.overlaps(span)));
                        model.add(span, value);
                    }
                    Err(OverlapError::Overlaps { met, .. }) => {
                        prop_assert!(met.overlaps(span) && model.0.iter().any(|(s, _)| *s == met));
                    }
                    Err(OverlapError::OutOfMemory(error)) => return Err(TestCaseError::fail(error.to_string())),
                },
                Step::Remove(n) if model.0.is_empty() => prop_assert_eq!(map.remove(Iova::new(n as u64)), None),
                Step::Remove(n) => {
                    let (span, value) = model.0.remove(n % model.0.len());
                    if span.len() > 1 {
                        prop_assert_eq!(map.remove(span.last()), None);
                    }
                    prop_assert_eq!(map.remove(span.start()), Some((span, value)));
                }
                Step::Set(span, value) => {
                    map.set(span, value).unwrap();
                    model.set(span, value);
                }
                Step::Clear(span) => {
                    map.clear(span).unwrap();
                    model.clear(span);
                }
            }
            compare(&map, &model, probe)?;
            map.overlapping_mut(probe, |_, value| *value = (*value + 1) % 3);
            model.0.iter_mut().filter(|(s, _)| s.overlaps(probe)).for_each(|(_, v)| *v = (*v + 1) % 3);
            compare(&map, &model, probe)?;
        }
    }

    #[test]
    fn interval_tree(steps in prop::collection::vec((any_span(), any::<usize>(), any::<bool>()), 1..120)) {
        let mut tree = IntervalTree::new();
        let mut model = Vec::new();
        let mut gone = Vec::new();
        for (n, (span, pick, take)) in steps.into_iter().enumerate() {
            if take && !model.is_empty() {
                let (exact, handle, value) = model[pick % model.len()];
                prop_assert_eq!(tree.get(handle), Some((exact, &value)));
                let value = if pick % 2 == 0 { tree.remove(handle) } else { tree.remove_exact(exact) };
                let at = model.iter().position(|(s, _, v)| *s == exact && Some(*v) == value);
                let (_, handle, _) = model.remove(at.ok_or_else(|| TestCaseError::fail("another entry went"))?);
                gone.push(handle);
            } else {
                model.push((span, tree.insert(span, n).unwrap(), n));
            }
            for handle in &gone {
                prop_assert_eq!(tree.get(*handle), None);
            }
            let mut found: Vec<_> = tree.overlapping(span).map(|(s, v)| (s, *v)).collect();
            prop_assert!(found.is_sorted_by_key(|(s, _)| s.start()));
            found.sort();
            let mut expected: Vec<_> = model.iter().filter(|(s, ..)| s.overlaps(span)).map(|(s, _, v)| (*s, *v)).collect();
            expected.sort();
            prop_assert_eq!(found, expected);
            prop_assert_eq!(tree.len(), model.len());
            if !model.iter().any(|(s, ..)| *s == span) {
                prop_assert_eq!(tree.remove_exact(span), None);
            }
            // Address by address, what no entry covers.
            let free = |at: u64| !model.iter().any(|(s, ..)| s.contains(Iova::new(at)));
            let gaps: Vec<_> = tree.gaps(span).collect();
            prop_assert!(gaps.windows(2).all(|pair| pair[0].last() < pair[1].start() && !pair[0].touches(pair[1])));
            for at in span.start().get()..=span.last().get().min(span.start().get().saturating_add(400)) {
                prop_assert_eq!(gaps.iter().any(|gap| gap.contains(Iova::new(at))), free(at), "{} in gaps of {:?}", at, span);
            }
            prop_assert!(gaps.iter().all(|gap| span.covers(*gap)), "{:?} of {:?}", gaps, span);
        }
    }
}

#[test]
fn reserved_inserts_keep_their_room() {
    let mut map = SpanMap::new();
    map.reserve(3).unwrap();
    for n in 0..3 {
        map.insert(span(n * 10, n * 10 + 4), ()).unwrap();
    }
    assert_eq!(map.first_gap(span(0, 1000), 6, |gap| Some(gap.start())), Some(Iova::new(25)));
    assert_eq!(map.insert(span(4, 7), ()), Err(OverlapError::Overlaps { span: span(4, 7), met: span(0, 4) }));
}
