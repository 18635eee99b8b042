//! What names, labels, ports and addresses may look like, with upstream's messages. An empty answer means valid.

use std::net::IpAddr;

pub const DNS1123_LABEL_MAX: usize = 63;
pub const DNS1123_SUBDOMAIN_MAX: usize = 253;
pub const LABEL_VALUE_MAX: usize = 63;
pub const QUALIFIED_NAME_MAX: usize = 63;

const LABEL_RE: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const LABEL_TEXT: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character";
const SUBDOMAIN_TEXT: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character";
const SUBDOMAIN_RE: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
const DNS1035_TEXT: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character";
const QUALIFIED_TEXT: &str =
    "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";
const VALUE_TEXT: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character";

/// What is said of a name that is too long. Upstream counts bytes everywhere, but calls them characters for DNS names.
pub fn max_len_error(max: usize) -> String {
    format!("must be no more than {max} characters")
}

fn max_bytes_error(max: usize) -> String {
    format!("must be no more than {max} bytes")
}

/// The same messages as declared rules give them, which call bytes what they count.
pub fn in_bytes(mut messages: Vec<String>) -> Vec<String> {
    for message in messages.iter_mut().filter(|message| message.starts_with("must be no more than ")) {
        *message = message.replace(" characters", " bytes");
    }
    messages
}

/// The message of a failed pattern: what it means, examples (with upstream's odd spacing), and the pattern itself.
pub fn regex_error(text: &str, pattern: &str, examples: &[&str]) -> String {
    let quoted: Vec<String> = examples.iter().map(|e| format!("'{e}'")).collect();
    match quoted.as_slice() {
        [] => format!("{text} (regex used for validation is '{pattern}')"),
        examples => format!("{text} (e.g. {}, regex used for validation is '{pattern}')", examples.join(",  or ")),
    }
}

fn edges_and_middle(s: &str, edge: impl Fn(u8) -> bool, middle: impl Fn(u8) -> bool) -> bool {
    let bytes = s.as_bytes();
    match (bytes.first(), bytes.last()) {
        (Some(first), Some(last)) => edge(*first) && edge(*last) && bytes.iter().all(|b| middle(*b)),
        _ => false,
    }
}

fn lower_alnum(b: u8) -> bool {
    b.is_ascii_lowercase() || b.is_ascii_digit()
}

fn dns_label_shape(s: &str) -> bool {
    edges_and_middle(s, lower_alnum, |b| lower_alnum(b) || b == b'-')
}

fn qualified_shape(s: &str) -> bool {
    edges_and_middle(s, |b| b.is_ascii_alphanumeric(), |b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

fn check(value: &str, max: usize, shape: bool, message: impl FnOnce() -> String) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > max {
        errors.push(max_len_error(max));
    }
    if !shape {
        errors.push(message());
    }
    errors
}

/// Names of namespaces and most things that become part of a host name.
pub fn is_dns1123_label(value: &str) -> Vec<String> {
    let message = || {
        // What would do as a subdomain fails only for its dots.
        if value.contains('.') && value.split('.').all(dns_label_shape) {
            return "must not contain dots".into();
        }
        regex_error(LABEL_TEXT, LABEL_RE, &["my-name", "123-abc"])
    };
    check(value, DNS1123_LABEL_MAX, dns_label_shape(value), message)
}

/// Names of most objects.
pub fn is_dns1123_subdomain(value: &str) -> Vec<String> {
    let message = || regex_error(SUBDOMAIN_TEXT, SUBDOMAIN_RE, &["example.com"]);
    check(value, DNS1123_SUBDOMAIN_MAX, value.split('.').all(dns_label_shape), message)
}

/// The same with underscores: names that resolvers search in.
pub fn is_dns1123_subdomain_with_underscores(value: &str) -> Vec<String> {
    const TEXT: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '_', '-' or '.', and must start and end with an alphanumeric character";
    const PATTERN: &str = "_?[a-z0-9]([-_a-z0-9]*[a-z0-9])?(\\._?[a-z0-9]([-_a-z0-9]*[a-z0-9])?)*";
    let label = |label: &str| {
        let label = label.strip_prefix('_').unwrap_or(label);
        edges_and_middle(label, lower_alnum, |b| lower_alnum(b) || b == b'-' || b == b'_')
    };
    let message = || regex_error(TEXT, PATTERN, &["example.com"]);
    check(value, DNS1123_SUBDOMAIN_MAX, value.split('.').all(label), message)
}

/// The same with capital letters, which only names of drivers may have.
pub fn is_dns1123_subdomain_caseless(value: &str) -> Vec<String> {
    const TEXT: &str = "an RFC 1123 subdomain must consist of alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character";
    let message = || regex_error(TEXT, SUBDOMAIN_RE, &["Example.com"]);
    let shape = value.to_ascii_lowercase().split('.').all(dns_label_shape);
    in_bytes(check(value, DNS1123_SUBDOMAIN_MAX, shape, message))
}

/// Names of Services.
pub fn is_dns1035_label(value: &str) -> Vec<String> {
    let shape = dns_label_shape(value) && value.as_bytes()[0].is_ascii_lowercase();
    let message = || regex_error(DNS1035_TEXT, "[a-z]([-a-z0-9]*[a-z0-9])?", &["my-name", "abc-123"]);
    check(value, DNS1123_LABEL_MAX, shape, message)
}

/// A DNS subdomain that may start with `*.`.
pub fn is_wildcard_dns1123_subdomain(value: &str) -> Vec<String> {
    let shape = value.strip_prefix("*.").is_some_and(|rest| rest.split('.').all(dns_label_shape));
    let text = "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character";
    let message = || regex_error(text, &format!("\\*\\.{SUBDOMAIN_RE}"), &["*.example.com"]);
    check(value, DNS1123_SUBDOMAIN_MAX, shape, message)
}

/// `name` or `dns.prefix/name`: keys of labels and annotations, names of resources.
pub fn is_qualified_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let name = match value.split_once('/') {
        None => value,
        Some((prefix, name)) if !name.contains('/') => {
            if prefix.is_empty() {
                errors.push("prefix part must be non-empty".into());
            } else {
                errors.extend(is_dns1123_subdomain(prefix).into_iter().map(|m| format!("prefix part {m}")));
            }
            name
        }
        Some(_) => {
            let text = format!("a valid label key {QUALIFIED_TEXT}");
            let examples = ["MyName", "my.name", "123-abc"];
            let message = regex_error(&text, "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]", &examples);
            return vec![format!(
                "{message} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".into());
    } else if name.len() > QUALIFIED_NAME_MAX {
        errors.push(format!("name part {}", max_bytes_error(QUALIFIED_NAME_MAX)));
    }
    if !qualified_shape(name) {
        let examples = ["MyName", "my.name", "123-abc"];
        let message = regex_error(QUALIFIED_TEXT, "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]", &examples);
        errors.push(format!("name part {message}"));
    }
    errors
}

pub fn is_valid_label_value(value: &str) -> Vec<String> {
    let pattern = "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?";
    let message = || regex_error(VALUE_TEXT, pattern, &["MyValue", "my_value", "12345"]);
    let mut errors = check(value, usize::MAX, value.is_empty() || qualified_shape(value), message);
    if value.len() > LABEL_VALUE_MAX {
        errors.insert(0, max_bytes_error(LABEL_VALUE_MAX));
    }
    errors
}

/// Names of RBAC objects and others that only have to fit into a URL's path.
pub fn is_path_segment(value: &str) -> Vec<String> {
    if value == "." || value == ".." {
        return vec![format!("may not be '{value}'")];
    }
    ["/", "%"].iter().filter(|s| value.contains(**s)).map(|s| format!("may not contain '{s}'")).collect()
}

/// Keys of ConfigMaps and Secrets.
pub fn is_config_map_key(value: &str) -> Vec<String> {
    let shape = !value.is_empty() && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    let text = "a valid config key must consist of alphanumeric characters, '-', '_' or '.'";
    let message = || regex_error(text, "[-._a-zA-Z0-9]+", &["key.name", "KEY_NAME", "key-name"]);
    let mut errors = check(value, DNS1123_SUBDOMAIN_MAX, shape, message);
    match value {
        "." => errors.push("must not be '.'".into()),
        v if v == ".." || v.starts_with("..") => {
            errors.push(if v == ".." { "must not be '..'".into() } else { "must not start with '..'".into() });
        }
        _ => {}
    }
    errors
}

/// Names of environment variables: any printable ASCII but `=`.
pub fn is_env_var_name(value: &str) -> Vec<String> {
    if value.is_empty() {
        return vec!["environment variable names must be non-empty".into()];
    }
    if value.bytes().all(|b| (0x20..0x7f).contains(&b) && b != b'=') {
        return Vec::new();
    }
    vec!["a valid environment variable name must consist only of printable ASCII characters other than '='".into()]
}

/// Names of ports in pods and services: up to 15 of `a-z0-9-`, at least one letter, no `--`.
pub fn is_valid_port_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    if value.len() > 15 {
        errors.push("must be no more than 15 characters".into());
    }
    if !value.bytes().all(|b| lower_alnum(b) || b == b'-') || value.is_empty() {
        errors.push("must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)".into());
    }
    if !value.bytes().any(|b| b.is_ascii_lowercase()) {
        errors.push("must contain at least one letter (a-z)".into());
    }
    if value.contains("--") {
        errors.push("must not contain consecutive hyphens".into());
    }
    if value.starts_with('-') || value.ends_with('-') {
        errors.push("must not begin or end with a hyphen".into());
    }
    errors
}

pub fn is_valid_port_number(port: i64) -> Vec<String> {
    in_range(port, 1, 65535)
}

pub fn is_valid_percent(value: &str) -> Vec<String> {
    let digits = value.strip_suffix('%').unwrap_or("");
    if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        return Vec::new();
    }
    let text = "a valid percent string must be a numeric string followed by an ending '%'";
    vec![regex_error(text, "[0-9]+%", &["1%", "93%"])]
}

pub fn in_range(value: i64, low: i64, high: i64) -> Vec<String> {
    if (low..=high).contains(&value) {
        Vec::new()
    } else {
        vec![format!("must be between {low} and {high}, inclusive")]
    }
}

pub fn is_valid_ip(value: &str) -> Vec<String> {
    match value.parse::<IpAddr>() {
        Ok(_) => Vec::new(),
        Err(_) => vec!["must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)".into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        type Check = fn(&str) -> Vec<String>;
        let cases: [(Check, &[&str], &[&str]); 8] = [
            (is_dns1123_label, &["a", "a-1", "1a"], &["", "-a", "a-", "A", "a.b", "a_b"]),
            (is_dns1123_subdomain, &["a.b", "a"], &["", "a..b", ".a", "a.", "A.b"]),
            (is_dns1035_label, &["a-1"], &["1a", "", "a."]),
            (is_qualified_name, &["a", "A_b.c", "x.io/A"], &["", "/a", "x/", "a/b/c", "-a", "X/a"]),
            (is_valid_label_value, &["", "A_b", "1"], &["-", "a b", "a/"]),
            (is_config_map_key, &["a", ".a", "A-b_c"], &["", ".", "..", "..a", "a/b"]),
            (is_valid_port_name, &["http", "a-1"], &["1", "a--b", "-a", "", "sixteencharacter"]),
            (is_valid_percent, &["1%"], &["%", "1", "1.5%"]),
        ];
        for (check, good, bad) in cases {
            for name in good {
                assert_eq!(check(name), Vec::<String>::new(), "{name:?}");
            }
            for name in bad {
                assert_ne!(check(name), Vec::<String>::new(), "{name:?}");
            }
        }
        assert_eq!(is_dns1123_label(&"a".repeat(64)), ["must be no more than 63 characters"]);
    }

    #[test]
    fn the_message_users_search_for() {
        assert_eq!(
            is_dns1123_subdomain("A_b"),
            [
                "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
            ]
        );
    }
}
