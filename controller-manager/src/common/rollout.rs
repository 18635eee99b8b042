//! Numbers of rollouts: how many pods may be too many or too few.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A number or a percentage of `total`, rounded as asked; nothing is zero.
pub fn resolve(value: Option<&IntOrString>, total: i32, round_up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => {
            let Some(percent) = text.strip_suffix('%').and_then(|digits| digits.parse::<i64>().ok()) else { return 0 };
            let product = percent.saturating_mul(i64::from(total));
            let rounded = if round_up { product.saturating_add(99).div_euclid(100) } else { product.div_euclid(100) };
            i32::try_from(rounded).unwrap_or(i32::MAX)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_percentages() {
        let percent = |text: &str| IntOrString::String(text.to_owned());
        for (value, total, up, down) in [
            (IntOrString::Int(3), 10, 3, 3),
            (percent("25%"), 10, 3, 2),
            (percent("100%"), 7, 7, 7),
            (percent("x"), 7, 0, 0),
        ] {
            assert_eq!((resolve(Some(&value), total, true), resolve(Some(&value), total, false)), (up, down));
        }
    }
}
