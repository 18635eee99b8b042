//! Bootstrap tokens, by which new nodes make the cluster's acquaintance: signing what they learn about it, and removing
//! tokens whose time is over. Both run only when asked for, as `kubeadm` does.

mod clean;
mod sign;

pub use clean::start as start_cleaner;
pub use sign::start as start_signer;

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Secret;

use crate::common::{elapsed, namespace};

/// Where tokens are kept.
const NAMESPACE: &str = "kube-system";
pub const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";

fn is_token(secret: &Secret) -> bool {
    secret.type_.as_deref() == Some(SECRET_TYPE) && namespace(&secret.metadata) == NAMESPACE
}

/// A text of the secret; none if it is empty or no text.
fn text<'a>(secret: &'a Secret, key: &str) -> Option<&'a str> {
    let bytes = secret.data.as_ref()?.get(key)?;
    std::str::from_utf8(&bytes.0).ok().filter(|text| !text.is_empty())
}

#[derive(Debug, PartialEq)]
enum Life {
    Forever,
    For(Duration),
    Over,
}

/// How long the token may still be used. What cannot be read as a time is over.
fn life(secret: &Secret, now: Timestamp) -> Life {
    let has = secret.data.as_ref().and_then(|data| data.get("expiration")).is_some_and(|bytes| !bytes.0.is_empty());
    let expiration = text(secret, "expiration").and_then(|text| text.parse::<Timestamp>().ok());
    match expiration {
        None if has => Life::Over,
        None => Life::Forever,
        Some(end) if end <= now => Life::Over,
        Some(end) => Life::For(elapsed(now, end)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use serde_json::{Value, json};

    /// A token with these texts.
    pub fn token(name: &str, texts: &[(&str, &str)]) -> Secret {
        let data: serde_json::Map<String, Value> =
            texts.iter().map(|(key, text)| ((*key).to_owned(), json!(BASE64_STANDARD.encode(text)))).collect();
        serde_json::from_value(json!({"type": SECRET_TYPE, "data": data,
            "metadata": {"name": name, "namespace": NAMESPACE, "uid": name}}))
        .unwrap()
    }

    #[test]
    fn the_life_of_tokens() {
        let now = Timestamp::from_second(100).unwrap();
        for (texts, expected) in [
            (&[][..], Life::Forever),
            (&[("expiration", "1970-01-01T00:02:00Z")], Life::For(Duration::from_secs(20))),
            (&[("expiration", "1970-01-01T01:01:40+01:00")], Life::Over),
            (&[("expiration", "tomorrow")], Life::Over),
        ] {
            assert_eq!(life(&token("t", texts), now), expected, "{texts:?}");
        }
    }
}
