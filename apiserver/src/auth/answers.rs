//! Answers of webhooks that are good for a while.

use std::collections::HashMap;
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

/// Answers that are kept at most.
const KEPT: usize = 8192;

/// Answers by question. Questions are kept as digests: they may be secret, or long.
pub struct Answers<T>(Mutex<HashMap<[u8; 32], (Instant, T)>>);

impl<T> Default for Answers<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Answers<T> {
    pub fn get(&self, question: &str) -> Option<T> {
        let answers = self.0.lock();
        let (until, answer) = answers.get(&digest(question))?;
        (*until > Instant::now()).then(|| answer.clone())
    }

    pub fn keep(&self, question: &str, answer: T, good_for: Duration) {
        if good_for.is_zero() {
            return;
        }
        let now = Instant::now();
        let mut answers = self.0.lock();
        if answers.len() >= KEPT {
            answers.retain(|_, (until, _)| *until > now);
        }
        if answers.len() >= KEPT {
            answers.clear();
        }
        answers.insert(digest(question), (now + good_for, answer));
    }
}

fn digest(question: &str) -> [u8; 32] {
    Sha256::digest(question).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_good_for_a_while() {
        let answers = Answers::default();
        answers.keep("a", 1, Duration::from_secs(10));
        answers.keep("b", 2, Duration::ZERO);
        answers.keep("c", 3, Duration::from_nanos(1));
        assert_eq!((answers.get("a"), answers.get("b"), answers.get("c")), (Some(1), None, None));
    }
}
