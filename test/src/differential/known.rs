//! The differences that are accepted, each with its reason. One that no longer occurs must go from the list, so that
//! the list never says more than is true.

use std::path::Path;

use serde::Deserialize;

use super::compare::Difference;
use super::{Error, Result, corpus};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Known {
    /// The case; `*` stands for anything.
    case: String,
    /// The place; `*` stands for anything.
    at: String,
    /// Part of upstream's side, where the place alone says too little.
    #[serde(default)]
    upstream: String,
    reason: String,
}

/// What the list does not explain, and what it explains in vain.
pub struct Verdict {
    pub unlisted: Vec<Difference>,
    pub unused: Vec<String>,
    pub listed: usize,
}

pub fn read(data: &Path) -> Result<Vec<Known>> {
    let known: Vec<Known> = corpus::read(&data.join("known.yaml"))?;
    match known.iter().find(|known| known.reason.trim().is_empty()) {
        Some(known) => Err(Error::Case { case: known.case.clone(), why: "known.yaml gives no reason".into() }),
        None => Ok(known),
    }
}

impl Known {
    fn explains(&self, difference: &Difference) -> bool {
        glob(&self.case, &difference.case)
            && glob(&self.at, &difference.at)
            && (self.upstream.is_empty() || difference.upstream.contains(&self.upstream))
    }
}

/// `whole` says that everything was asked: only then can an entry be called in vain.
pub fn judge(known: &[Known], found: Vec<Difference>, whole: bool) -> Verdict {
    let mut used = vec![false; known.len()];
    let mut unlisted = Vec::new();
    let all = found.len();
    for difference in found {
        let mut explained = false;
        for (_, used) in known.iter().zip(&mut used).filter(|(known, _)| known.explains(&difference)) {
            *used = true;
            explained = true;
        }
        if !explained {
            unlisted.push(difference);
        }
    }
    let in_vain = known.iter().zip(used).filter(|(_, used)| whole && !used);
    let unused = in_vain.map(|(known, _)| format!("{} at {}: {}", known.case, known.at, known.reason)).collect();
    Verdict { listed: all - unlisted.len(), unlisted, unused }
}

/// Whether the text is the pattern, where `*` stands for any number of letters.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == text };
    let Some(rest) = text.strip_prefix(head) else { return false };
    let starts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    starts.into_iter().any(|at| glob(tail, &rest[at..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference(case: &str, at: &str) -> Difference {
        Difference { case: case.into(), at: at.into(), ours: "a".into(), upstream: "b".into() }
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, text, expected) in [
            ("a*c", "abc", true),
            ("a*c", "ab", false),
            ("*", "", true),
            ("a", "a", true),
            ("a", "ab", false),
            ("*b*", "abc", true),
        ] {
            assert_eq!(glob(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn what_is_not_listed_and_what_is_listed_in_vain_are_told() {
        let known =
            |case: &str| Known { case: case.into(), at: "*".into(), upstream: String::new(), reason: "so".into() };
        let found = vec![difference("pods: create", "/a"), difference("nodes: create", "/a")];
        let verdict = judge(&[known("pods*"), known("jobs*")], found, true);
        assert_eq!(verdict.unlisted, [difference("nodes: create", "/a")]);
        assert_eq!((verdict.listed, verdict.unused), (1, vec!["jobs* at *: so".to_owned()]));
    }
}
