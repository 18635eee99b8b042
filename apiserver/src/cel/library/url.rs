//! Absolute URLs and paths, split as Go splits them: `url("https://a:80/b?c=d").getHost()`.

use std::collections::HashMap;

use cel::common::types::{CelBool, CelMap, CelMapKey, CelString};
use cel::common::value::Val;
use cel::{DeclarationError, Env, ExecutionError};

use super::text::texts;
use super::{failure, value_type};

/// The parts as they were written; Go's decodes some and encodes them again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Url {
    scheme: String,
    /// With the port, without the user.
    host: String,
    path: String,
    query: String,
}

value_type!(Url, "kubernetes.URL");

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(Url::cel_type().to_owned())?;
    cel::add_overload!(env, fn url: (CelString) -> Result<Url>)?;
    cel::add_overload!(env, fn is_url: (CelString) -> CelBool, name = "isURL")?;
    cel::add_member_overload!(env, fn get_scheme: (Url) -> CelString)?;
    cel::add_member_overload!(env, fn get_host: (Url) -> CelString)?;
    cel::add_member_overload!(env, fn get_hostname: (Url) -> CelString)?;
    cel::add_member_overload!(env, fn get_port: (Url) -> CelString)?;
    cel::add_member_overload!(env, fn get_escaped_path: (Url) -> CelString)?;
    cel::add_member_overload!(env, fn get_query: (Url) -> CelMap)
}

/// An absolute URL or an absolute path; a fragment belongs to what is before it until [`url`] cuts it off.
pub fn parse_request_uri(text: &str) -> Result<Url, String> {
    let wrong = |why: &str| format!("parse {text:?}: {why}");
    if text.is_empty() {
        return Err(wrong("empty url"));
    }
    if text.bytes().any(|byte| byte < b' ' || byte == 0x7f) {
        return Err(wrong("net/url: invalid control character in URL"));
    }
    let (scheme, rest) = split_scheme(text).ok_or_else(|| wrong("missing protocol scheme"))?;
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut url = Url { scheme: scheme.to_ascii_lowercase(), query: query.to_owned(), ..Url::default() };
    if !rest.starts_with('/') {
        // Of an opaque URL (`mailto:a@b`) only the scheme is known.
        return if scheme.is_empty() { Err(wrong("invalid URI for request")) } else { Ok(url) };
    }
    let path = match rest.strip_prefix("//") {
        Some(authority) if !scheme.is_empty() => {
            let (authority, path) = authority.split_at(authority.find('/').unwrap_or(authority.len()));
            let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
            check_host(host).map_err(|why| wrong(&why))?;
            url.host = host.to_owned();
            path
        }
        _ => rest,
    };
    check_escapes(path).map_err(|why| wrong(&why))?;
    url.path = escape(path);
    Ok(url)
}

/// `None`: a colon without anything before it.
fn split_scheme(text: &str) -> Option<(&str, &str)> {
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' => {}
            b'0'..=b'9' | b'+' | b'-' | b'.' if index > 0 => {}
            b':' if index == 0 => return None,
            b':' => return Some((&text[..index], &text[index + 1..])),
            _ => break,
        }
    }
    Some(("", text))
}

fn check_host(host: &str) -> Result<(), String> {
    let port = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("missing ']' in host")?.1,
        None => host.rfind(':').map_or("", |colon| &host[colon..]),
    };
    let is_port = port.is_empty() || port.strip_prefix(':').is_some_and(|p| p.bytes().all(|b| b.is_ascii_digit()));
    if !is_port {
        return Err(format!("invalid port {port:?} after host"));
    }
    match host.chars().find(|letter| letter.is_ascii() && !is_host_letter(*letter)) {
        Some(letter) => Err(format!("invalid character {:?} in host name", letter.to_string())),
        None => Ok(()),
    }
}

fn is_host_letter(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || "-_.~!$&'()*+,;=:[]<>\"%".contains(letter)
}

fn check_escapes(path: &str) -> Result<(), String> {
    let bytes = path.as_bytes();
    for (index, _) in path.match_indices('%') {
        let code = bytes.get(index + 1..index + 3);
        if !code.is_some_and(|code| code.iter().all(u8::is_ascii_hexdigit)) {
            let shown: String = path[index..].chars().take(3).collect();
            return Err(format!("invalid URL escape {shown:?}"));
        }
    }
    Ok(())
}

/// What cannot be in a path as it is gets encoded; what is encoded stays.
fn escape(path: &str) -> String {
    let mut escaped = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => escaped.push(char::from(byte)),
            byte if b"-_.~!$&'()*+,;=:@/%[]".contains(&byte) => escaped.push(char::from(byte)),
            byte => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

fn url(text: &CelString<'_>) -> Result<Url, ExecutionError> {
    let told = |why| failure("url", format!("URL parse error during conversion from string: {why}"));
    parse_request_uri(text.inner()).map_err(told)?;
    let (before, _fragment) = text.inner().split_once('#').unwrap_or((text.inner(), ""));
    parse_request_uri(before).map_err(told)
}

fn is_url(text: &CelString<'_>) -> CelBool {
    parse_request_uri(text.inner()).is_ok().into()
}

fn get_scheme(url: &Url) -> CelString<'static> {
    url.scheme.clone().into()
}

fn get_host(url: &Url) -> CelString<'static> {
    url.host.clone().into()
}

/// Name and port.
fn split_host(host: &str) -> (&str, &str) {
    if let Some(rest) = host.strip_prefix('[') {
        let (name, port) = rest.split_once(']').unwrap_or((rest, ""));
        return (name, port.strip_prefix(':').unwrap_or(""));
    }
    host.rsplit_once(':').unwrap_or((host, ""))
}

fn get_hostname(url: &Url) -> CelString<'static> {
    split_host(&url.host).0.to_owned().into()
}

fn get_port(url: &Url) -> CelString<'static> {
    split_host(&url.host).1.to_owned().into()
}

fn get_escaped_path(url: &Url) -> CelString<'static> {
    url.path.clone().into()
}

/// Every parameter with all its values.
fn get_query(url: &Url) -> CelMap<'static> {
    let mut parameters: HashMap<String, Vec<String>> = HashMap::new();
    for (name, value) in form_urlencoded::parse(url.query.as_bytes()) {
        parameters.entry(name.into_owned()).or_default().push(value.into_owned());
    }
    let entries: HashMap<CelMapKey<'static>, Box<dyn Val>> = parameters
        .into_iter()
        .map(|(name, values)| (CelMapKey::from(name), Box::new(texts(values.into_iter())) as Box<dyn Val>))
        .collect();
    entries.into()
}
