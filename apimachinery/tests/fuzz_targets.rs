//! Runs the fuzz targets for a bounded number of inputs: the seeds, and what small damage makes of them. The same on
//! every run, so that a failure can be repeated; `cargo fuzz run` looks further.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Inputs of each target.
const INPUTS: u64 = 2_000;
/// What breaks decoders more often than noise does.
const TOKENS: &[&[u8]] = &[
    b"null",
    b"{}",
    b"[]",
    b"\"",
    b"-1",
    b"1e999",
    b"\xff",
    b"\0",
    b"$patch",
    b"*a",
    b"&a",
    b"~1",
    b"\x80\x80\x80\x80",
];

fn damaged(seeds: &[&str], rng: &mut StdRng) -> Vec<u8> {
    let mut input = seeds[rng.random_range(0..seeds.len())].as_bytes().to_vec();
    for _ in 0..rng.random_range(1..=4) {
        let at = rng.random_range(0..=input.len());
        match rng.random_range(0..5) {
            0 if at < input.len() => input[at] = rng.random(),
            1 => drop(input.drain(at..(at + rng.random_range(0..8)).min(input.len()))),
            2 => {
                let token = TOKENS[rng.random_range(0..TOKENS.len())];
                input.splice(at..at, token.iter().copied());
            }
            3 => {
                let other = seeds[rng.random_range(0..seeds.len())].as_bytes();
                let from = rng.random_range(0..=other.len());
                let end = (from + rng.random_range(0..64)).min(other.len());
                input.splice(at..at, other[from..end].iter().copied());
            }
            _ => {
                let end = (at + rng.random_range(0..32)).min(input.len());
                let copy = input[at..end].to_vec();
                input.splice(at..at, copy);
            }
        }
    }
    input
}

#[test]
fn no_input_breaks_a_target() {
    for target in targets::TARGETS {
        target.seeds.iter().for_each(|seed| (target.run)(seed.as_bytes()));
        for number in 0..INPUTS {
            let input = damaged(target.seeds, &mut StdRng::seed_from_u64(number));
            let broke = std::panic::catch_unwind(|| (target.run)(&input)).is_err();
            assert!(!broke, "{} breaks on input {number}: {:?}", target.name, String::from_utf8_lossy(&input));
        }
    }
}
