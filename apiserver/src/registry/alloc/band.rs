//! Where in a range numbers are taken from. The lower end is left to users who choose numbers themselves, as long as
//! the upper end has free ones; within a band the start is random, so that servers seldom meet.

/// The size of the lower band: a fraction of the range within limits, 0 for ranges too small to share.
pub fn lower(size: u128, least: u128, most: u128, step: u128) -> u128 {
    if size <= least { 0 } else { (size / step).clamp(least, most) }
}

/// The first free number of `0..size`: from a random place in the upper band on, then in the lower band.
pub fn pick(size: u128, lower: u128, random: u128, is_taken: impl Fn(u128) -> bool) -> Option<u128> {
    let upper = size.checked_sub(lower).filter(|n| *n > 0)?;
    let start = random % upper;
    let in_upper = (start..upper).chain(0..start).map(|n| lower + n);
    in_upper.chain(0..lower).find(|n| !is_taken(*n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bands_are_upstreams() {
        assert_eq!(lower(254, 16, 256, 16), 16);
        assert_eq!(lower(65_534, 16, 256, 16), 256);
        assert_eq!(lower(10, 16, 256, 16), 0);
        assert_eq!(lower(2768, 16, 128, 32), 86);
    }

    #[test]
    fn the_lower_band_comes_last() {
        assert_eq!(pick(10, 4, 1, |_| false), Some(5));
        assert_eq!(pick(10, 4, 5, |n| n == 9), Some(4));
        assert_eq!(pick(10, 4, 0, |n| n >= 4), Some(0));
        assert_eq!(pick(10, 4, 0, |_| true), None);
    }
}
