//! Users by bearer token other than service accounts: the static `--token-auth-file` and bootstrap tokens, which are
//! secrets in kube-system. Where a token is found in a request is here, too.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::HeaderMap;
use http::header::{AUTHORIZATION, SEC_WEBSOCKET_PROTOCOL};
use serde_json::Value;

use super::UserInfo;
use super::objects::Objects;

const WEBSOCKET_TOKEN: &str = "base64url.bearer.authorization.k8s.io.";

/// The bearer token of a request: of the `Authorization` header, else of the WebSocket protocols, where browsers can
/// put it.
pub fn bearer_token(headers: &HeaderMap) -> Option<String> {
    let header = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if let Some((scheme, token)) = header.and_then(|header| header.trim().split_once(' '))
        && scheme.eq_ignore_ascii_case("bearer")
        && !token.trim().is_empty()
    {
        return Some(token.trim().to_owned());
    }
    let protocols = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    let encoded = protocols.flat_map(|line| line.split(',')).find_map(|p| p.trim().strip_prefix(WEBSOCKET_TOKEN))?;
    String::from_utf8(URL_SAFE_NO_PAD.decode(encoded).ok()?).ok()
}

#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path}:{line}: a line needs token, user name and user id")]
    Short { path: PathBuf, line: usize },
}

/// `--token-auth-file`: lines of `token,user,uid[,"group1,group2"]`.
#[derive(Default)]
pub struct TokenFile(HashMap<String, UserInfo>);

impl TokenFile {
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| TokenFileError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|line| TokenFileError::Short { path: path.to_owned(), line })
    }

    fn parse(text: &str) -> Result<Self, usize> {
        let mut tokens = HashMap::new();
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
        for (number, line) in lines {
            let fields = csv_fields(line);
            let [token, name, uid, rest @ ..] = fields.as_slice() else { return Err(number + 1) };
            let groups = rest.first().map(|list| list.split(',').map(str::to_owned).collect());
            let user = UserInfo {
                name: name.clone(),
                uid: uid.clone(),
                groups: groups.unwrap_or_default(),
                ..UserInfo::default()
            };
            if !token.is_empty() {
                tokens.insert(token.clone(), user);
            }
        }
        Ok(Self(tokens))
    }

    pub fn user(&self, token: &str) -> Option<UserInfo> {
        self.0.get(token).cloned()
    }
}

/// The fields of one line; a quoted field may hold commas and doubled quotes.
fn csv_fields(line: &str) -> Vec<String> {
    let (mut fields, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut chars = line.trim().chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => field.extend(chars.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(std::mem::take(&mut field).trim().to_owned()),
            c => field.push(c),
        }
    }
    fields.push(field.trim().to_owned());
    fields
}

/// The user of a bootstrap token (`abcdef.0123456789abcdef`), if a secret of kube-system knows it.
pub fn bootstrap_user(objects: &dyn Objects, token: &str, now: jiff::Timestamp) -> Option<UserInfo> {
    let (id, secret) = token.split_once('.')?;
    let valid =
        |text: &str, length| text.len() == length && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    if !valid(id, 6) || !valid(secret, 16) {
        return None;
    }
    let object = objects.get("", "secrets", "kube-system", &format!("bootstrap-token-{id}"))?;
    let data = |key: &str| {
        let encoded = object.pointer(&format!("/data/{key}")).and_then(Value::as_str)?;
        String::from_utf8(STANDARD.decode(encoded).ok()?).ok()
    };
    let expired = data("expiration").is_some_and(|at| at.parse::<jiff::Timestamp>().map_or(true, |at| at <= now));
    let usable = object["type"] == "bootstrap.kubernetes.io/token"
        && object["metadata"].get("deletionTimestamp").is_none()
        && data("token-id").as_deref() == Some(id)
        && data("token-secret").is_some_and(|known| constant_time_equal(known.as_bytes(), secret.as_bytes()))
        && data("usage-bootstrap-authentication").as_deref() == Some("true")
        && !expired;
    if !usable {
        return None;
    }
    let mut groups = vec!["system:bootstrappers".to_owned()];
    let extra = data("auth-extra-groups").unwrap_or_default();
    for group in extra.split(',').map(str::trim).filter(|group| !group.is_empty()) {
        if !group.starts_with("system:bootstrappers:") {
            return None;
        }
        groups.push(group.to_owned());
    }
    Some(UserInfo { name: format!("system:bootstrap:{id}"), groups, ..UserInfo::default() })
}

/// Compares without telling by its duration where the difference is.
pub fn constant_time_equal(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (x, y)| difference | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::objects::Fake;
    use super::*;

    #[test]
    fn tokens_are_found_where_clients_put_them() {
        for (name, value, token) in [
            ("authorization", "Bearer abc", Some("abc")),
            ("authorization", "bearer  abc ", Some("abc")),
            ("authorization", "Basic abc", None),
            ("authorization", "Bearer ", None),
            ("sec-websocket-protocol", "v5.channel.k8s.io, base64url.bearer.authorization.k8s.io.YWJj", Some("abc")),
        ] {
            let headers = HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())]);
            assert_eq!(bearer_token(&headers).as_deref(), token, "{value}");
        }
    }

    #[test]
    fn token_file_lines() {
        let file = TokenFile::parse("t1,jane,1,\"devs,ops\"\n\nt2,bob,2\n").unwrap_or_default();
        assert_eq!(file.user("t1").unwrap().groups, ["devs", "ops"]);
        assert_eq!(file.user("t2").unwrap().name, "bob");
        assert!(file.user("t3").is_none());
        assert_eq!(TokenFile::parse("t1,jane").err(), Some(1));
    }

    #[test]
    fn bootstrap_tokens() {
        let encode = |text: &str| STANDARD.encode(text);
        let secret = json!({
            "metadata": {"namespace": "kube-system", "name": "bootstrap-token-abcdef"},
            "type": "bootstrap.kubernetes.io/token",
            "data": {"token-id": encode("abcdef"), "token-secret": encode("0123456789abcdef"),
                "usage-bootstrap-authentication": encode("true"), "expiration": encode("2030-01-01T00:00:00Z"),
                "auth-extra-groups": encode("system:bootstrappers:kubeadm:default-node-token")},
        });
        let cluster = Fake(vec![("", "secrets", secret)]);
        let now = "2029-01-01T00:00:00Z".parse().unwrap();
        let user = bootstrap_user(&cluster, "abcdef.0123456789abcdef", now).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert_eq!(user.groups.len(), 2);
        assert!(bootstrap_user(&cluster, "abcdef.0123456789abcdee", now).is_none());
        assert!(bootstrap_user(&cluster, "abcdef.0123456789abcdef", "2031-01-01T00:00:00Z".parse().unwrap()).is_none());
    }
}
