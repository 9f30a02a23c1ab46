//! Which engine is asked for which of a request's blocks.
//!
//! ```text
//!   ids        a b c d e        engines:  0 has a d   1 has b c e
//!   parts      0: a d   1: b c e
//!   positions  0: 0 3   1: 1 2 4          where an answer's items belong in the request
//! ```

use crate::devices::Routes;
use crate::mail::{Ask, PlacesAsk};
use kvar_base::BlockId;

/// Ids by owner, and where each stood; with one owner in all, no positions.
pub(super) type Parts = (Vec<(u32, Vec<BlockId>)>, Vec<Vec<u32>>);

pub(super) fn split(ids: &[BlockId], routes: &Routes) -> Parts {
    if ids.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let engines = routes.engines().len();
    if engines <= 1 {
        return (vec![(0, ids.to_vec())], Vec::new());
    }
    let mut parts: Vec<Vec<BlockId>> = vec![Vec::new(); engines];
    let mut positions: Vec<Vec<u32>> = vec![Vec::new(); engines];
    for (position, id) in ids.iter().enumerate() {
        if let Some(part) = routes.owner_part(id) {
            parts[part].push(*id);
            positions[part].push(position as u32);
        }
    }
    let parts = (0..)
        .zip(parts)
        .filter(|(_, ids)| !ids.is_empty())
        .collect();
    (parts, positions)
}

/// What the tier below is asked for, by its engines; where the ids stand is noted.
pub(super) fn split_below<'a>(
    lacking: impl Iterator<Item = (u32, &'a BlockId)>,
    routes: &Routes,
    positions: &mut Vec<Vec<u32>>,
) -> Vec<(u32, Vec<BlockId>)> {
    let mut parts: Vec<(u32, Vec<BlockId>)> = Vec::new();
    for (position, id) in lacking {
        let Some(part) = routes.lower_part(id) else {
            continue;
        };
        if positions.len() < routes.engines().len() {
            positions.resize(routes.engines().len(), Vec::new());
        }
        positions[part].push(position);
        match parts.iter_mut().find(|(known, _)| *known as usize == part) {
            Some((_, ids)) => ids.push(*id),
            None => parts.push((part as u32, vec![*id])),
        }
    }
    parts
}

/// The parts of a request for so many ids, each with where its ids stand in their prompt.
pub(super) fn placed(
    parts: Vec<(u32, Vec<BlockId>)>,
    first_depth: u32,
    asked: usize,
    positions: &[Vec<u32>],
) -> Vec<(u32, Vec<BlockId>, PlacesAsk)> {
    let places = |part: u32| PlacesAsk {
        first_depth,
        each: positions.get(part as usize).cloned().unwrap_or_default(),
        asked: asked as u32,
    };
    let parts = parts.into_iter();
    parts.map(|(part, ids)| (part, ids, places(part))).collect()
}

/// A remove goes to every device: a block may have been put elsewhere while its owner was away, and
/// must not come back when its owner goes again.
pub(super) fn removals(
    ids: &[BlockId],
    routes: &Routes,
    is_meant: &dyn Fn(&usize) -> bool,
) -> Vec<(usize, Ask)> {
    let mut parts: Vec<Vec<BlockId>> = vec![Vec::new(); routes.engines().len()];
    for id in ids {
        for part in routes.holder_parts(id).filter(is_meant) {
            parts[part].push(*id);
        }
    }
    parts
        .into_iter()
        .enumerate()
        .filter(|(_, ids)| !ids.is_empty())
        .map(|(part, ids)| (part, Ask::Remove(ids)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_knows_the_whole_prompt_and_where_it_stands_in_it() {
        let id = |number: u8| BlockId::new([number; 32]);
        let parts = vec![(0, vec![id(0), id(3)]), (2, vec![id(1)])];
        let positions = [vec![0, 3], Vec::new(), vec![1]];
        let placed = placed(parts, 100, 4, &positions);
        let seen: Vec<_> = placed
            .iter()
            .map(|(part, ids, it)| (*part, ids.len(), it.first_depth, &it.each[..], it.asked))
            .collect();
        assert_eq!(seen, [(0, 2, 100, &[0, 3][..], 4), (2, 1, 100, &[1], 4)]);
        // One engine has all: in a row.
        let alone = super::placed(vec![(0, vec![id(0), id(1)])], 7, 2, &[]);
        assert!(alone[0].2.each.is_empty());
        assert_eq!((alone[0].2.first_depth, alone[0].2.asked), (7, 2));
    }
}
