//! Lending: levels that do not need all their seats let others have some, within what each may lend and borrow.

use std::sync::Arc;

use super::level::{Level, Settings};

/// Gives every level the seats that it has until the next time.
pub fn lend(levels: &[Arc<Level>]) {
    let demands: Vec<(Settings, usize)> = levels.iter().map(|level| level.demand()).collect();
    for (level, seats) in levels.iter().zip(seats(&demands)) {
        level.limit_to(seats);
    }
}

/// Seats by what was wanted. Those that want more than is theirs share what others leave, in proportion.
fn seats(demands: &[(Settings, usize)]) -> Vec<usize> {
    let spare = |(settings, wanted): &(Settings, usize)| settings.nominal.saturating_sub((*wanted).max(settings.least));
    let missing =
        |(settings, wanted): &(Settings, usize)| (*wanted).min(settings.most).saturating_sub(settings.nominal);
    let all_spare: usize = demands.iter().map(spare).sum();
    let all_missing: usize = demands.iter().map(missing).sum();
    let lent = all_spare.min(all_missing);
    let part = |own: usize, all: usize| (own * lent).checked_div(all).unwrap_or_default();
    demands
        .iter()
        .map(|demand| {
            let settings = &demand.0;
            settings.nominal + part(missing(demand), all_missing) - part(spare(demand), all_spare).min(settings.nominal)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_spare_is_lent() {
        let level = |lendable: i64, wanted: usize| {
            let object = json!({"spec": {"type": "Limited", "limited": {
                "nominalConcurrencyShares": 10, "lendablePercent": lendable}}});
            (Settings::read(&object, 30, 30), wanted)
        };
        let cases = [
            (vec![level(50, 0), level(50, 0), level(50, 0)], vec![10, 10, 10]),
            (vec![level(50, 0), level(50, 20), level(0, 0)], vec![5, 15, 10]),
            (vec![level(50, 8), level(50, 11), level(50, 10)], vec![9, 11, 10]),
            (vec![level(100, 0), level(0, 20), level(0, 40)], vec![0, 13, 16]),
        ];
        for (demands, expected) in cases {
            assert_eq!(seats(&demands), expected);
        }
    }
}
