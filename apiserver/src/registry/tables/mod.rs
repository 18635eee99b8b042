//! Cells of `kubectl get`: what several kinds' rows have in common, and the rows that are long enough for a file of
//! their own. The formats are upstream's to the letter, since people and scripts read them.

pub mod autoscaling;
pub mod pod;

use jiff::Timestamp;
use serde_json::{Map, Value};

use super::object::ObjectExt;

/// What a cell shows when there is nothing to show.
pub const NONE: &str = "<none>";
pub const UNSET: &str = "<unset>";
pub const UNKNOWN: &str = "<unknown>";

/// How long ago the object was created.
pub fn age(obj: &Value, now: Timestamp) -> Value {
    since(&obj["metadata"]["creationTimestamp"], now).into()
}

/// How long ago a point in time was, `<unknown>` when it is none.
pub fn since(time: &Value, now: Timestamp) -> String {
    timestamp(time).map_or_else(|| UNKNOWN.to_owned(), |then| human_duration(now.as_second() - then.as_second()))
}

/// Reads an RFC 3339 time.
pub fn timestamp(time: &Value) -> Option<Timestamp> {
    time.as_str()?.parse().ok()
}

/// Seconds with two or three significant figures: `45s`, `2m30s`, `3h12m`, `5d`, `2y30d`.
pub fn human_duration(seconds: i64) -> String {
    if seconds < -1 {
        return "<invalid>".into();
    }
    let (seconds, minutes, hours) = (seconds.max(0), seconds.max(0) / 60, seconds.max(0) / 3600);
    let (days, years) = (hours / 24, hours / 24 / 365);
    let two = |big: i64, unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{unit}") } else { format!("{big}{unit}{small}{small_unit}") }
    };
    match () {
        () if seconds < 120 => format!("{seconds}s"),
        () if minutes < 10 => two(minutes, "m", seconds % 60, "s"),
        () if minutes < 180 => format!("{minutes}m"),
        () if hours < 8 => two(hours, "h", minutes % 60, "m"),
        () if hours < 48 => format!("{hours}h"),
        () if hours < 24 * 8 => two(days, "d", hours % 24, "h"),
        () if hours < 24 * 365 * 2 => format!("{days}d"),
        () if hours < 24 * 365 * 8 => two(years, "y", days % 365, "d"),
        () => format!("{years}y"),
    }
}

/// The name, as the first cell of nearly every row.
pub fn name(obj: &Value) -> Value {
    obj.name().into()
}

/// The string at a path.
pub fn text(obj: &Value, path: &[&str]) -> Value {
    obj.str_at(path).into()
}

/// The string at a path, or what stands for none.
pub fn text_or(obj: &Value, path: &[&str], otherwise: &str) -> Value {
    match obj.str_at(path) {
        "" => otherwise.into(),
        text => text.into(),
    }
}

/// The number at a path, 0 when there is none.
pub fn number(obj: &Value, path: &[&str]) -> Value {
    obj.i64_at(path).unwrap_or(0).into()
}

/// The flag at a path.
pub fn flag(obj: &Value, path: &[&str]) -> Value {
    obj.bool_at(path).unwrap_or(false).into()
}

/// How many entries a list or map has.
pub fn count(value: &Value) -> usize {
    value.as_array().map(Vec::len).or_else(|| value.as_object().map(Map::len)).unwrap_or(0)
}

/// A scalar as text: numbers, int-or-strings, flags.
pub fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

/// Names and images of containers, each joined by commas.
pub fn containers(pod_spec: &Value) -> [Value; 2] {
    ["name", "image"].map(|field| {
        let cells: Vec<&str> = pod_spec.list_at(&["containers"]).iter().map(|c| c.str_at(&[field])).collect();
        cells.join(",").into()
    })
}

/// A map of labels as `a=b,c=d`.
pub fn labels(map: &Value) -> Value {
    let text = label_text(map);
    if text.is_empty() { NONE.into() } else { text.into() }
}

fn label_text(map: &Value) -> String {
    let mut pairs: Vec<String> =
        map.as_object().into_iter().flatten().map(|(key, value)| format!("{key}={}", scalar(value))).collect();
    pairs.sort();
    pairs.join(",")
}

/// A `LabelSelector` object in the notation of `kubectl get -l`, `<none>` when it is empty.
pub fn selector(selector: &Value) -> Value {
    let text = selector_text(selector);
    if text.is_empty() { NONE.into() } else { text.into() }
}

/// A `LabelSelector` object in the notation of `kubectl get -l`.
pub fn selector_text(selector: &Value) -> String {
    let equals = selector["matchLabels"].as_object().into_iter().flatten();
    let mut terms: Vec<(String, String)> =
        equals.map(|(key, value)| (key.clone(), format!("{key}={}", scalar(value)))).collect();
    for expression in selector.list_at(&["matchExpressions"]) {
        let key = expression.str_at(&["key"]);
        let mut values: Vec<&str> = expression.list_at(&["values"]).iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        let term = match expression.str_at(&["operator"]) {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            _ => return "<error>".into(),
        };
        terms.push((key.to_owned(), term));
    }
    terms.sort_by(|a, b| a.0.cmp(&b.0));
    terms.into_iter().map(|(_, term)| term).collect::<Vec<_>>().join(",")
}

/// The first `max` items, and how many more there are.
pub fn first_few(items: &[String], max: usize, none: &str) -> String {
    let shown = items[..items.len().min(max)].join(",");
    match items.len() {
        0 => none.to_owned(),
        all if all > max => format!("{shown} + {} more...", all - max),
        _ => shown,
    }
}

/// `RWO,ROX`, without repetitions, in upstream's order.
pub fn access_modes(modes: &Value) -> String {
    let short =
        [("ReadWriteOnce", "RWO"), ("ReadOnlyMany", "ROX"), ("ReadWriteMany", "RWX"), ("ReadWriteOncePod", "RWOP")];
    let given = modes.as_array().map(Vec::as_slice).unwrap_or_default();
    let shown: Vec<&str> =
        short.iter().filter(|(long, _)| given.iter().any(|mode| mode == long)).map(|(_, short)| *short).collect();
    shown.join(",")
}

/// Whether a condition of this type is `True`.
pub fn has_condition(obj: &Value, kind: &str) -> bool {
    condition(obj, kind).is_some_and(|c| c["status"] == "True")
}

/// The condition of this type.
pub fn condition<'a>(obj: &'a Value, kind: &str) -> Option<&'a Value> {
    obj.list_at(&["status", "conditions"]).iter().find(|c| c["type"] == kind)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn durations_have_two_or_three_figures() {
        let (minute, hour, day, year) = (60, 3600, 86400, 86400 * 365);
        let cases = [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (2 * minute, "2m"),
            (9 * minute + 59, "9m59s"),
            (10 * minute + 1, "10m"),
            (179 * minute, "179m"),
            (3 * hour, "3h"),
            (7 * hour + 59 * minute, "7h59m"),
            (47 * hour, "47h"),
            (2 * day, "2d"),
            (7 * day + 23 * hour, "7d23h"),
            (729 * day, "729d"),
            (2 * year + day, "2y1d"),
            (8 * year, "8y"),
        ];
        for (seconds, expected) in cases {
            assert_eq!(human_duration(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn selectors_read_as_they_are_typed() {
        let selector = json!({"matchLabels": {"b": "2"}, "matchExpressions": [
            {"key": "a", "operator": "In", "values": ["y", "x"]}, {"key": "c", "operator": "DoesNotExist"}]});
        assert_eq!(selector_text(&selector), "a in (x,y),b=2,!c");
        assert_eq!(super::selector(&json!({})), json!("<none>"));
        assert_eq!(labels(&json!({"b": "2", "a": "1"})), json!("a=1,b=2"));
    }

    #[test]
    fn long_lists_are_cut() {
        let items: Vec<String> = (1..=5).map(|n| n.to_string()).collect();
        assert_eq!(first_few(&items, 3, UNSET), "1,2,3 + 2 more...");
        assert_eq!(first_few(&items[..2], 3, UNSET), "1,2");
        assert_eq!(first_few(&[], 3, UNSET), "<unset>");
    }
}
