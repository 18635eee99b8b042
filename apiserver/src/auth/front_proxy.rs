//! Users by headers of an authenticating proxy. The proxy must show a certificate of its own authority: headers from
//! anybody else are as good as absent.

use std::path::Path;

use http::HeaderMap;
use rustls::pki_types::CertificateDer;

use super::UserInfo;
use super::certificates::{Authorities, AuthorityError, CertificateError};
use crate::config::Config;

/// `--requestheader-*`.
pub struct FrontProxy {
    authorities: Authorities,
    allowed_names: Vec<String>,
    username_headers: Vec<String>,
    uid_headers: Vec<String>,
    group_headers: Vec<String>,
    extra_prefixes: Vec<String>,
}

impl FrontProxy {
    pub fn new(ca_file: &Path, config: &Config) -> Result<Self, AuthorityError> {
        let lower = |names: &[String]| names.iter().map(|name| name.to_ascii_lowercase()).collect();
        Ok(Self {
            authorities: Authorities::read(ca_file)?,
            allowed_names: config.requestheader_allowed_names.clone(),
            username_headers: lower(&config.requestheader_username_headers),
            uid_headers: lower(&config.requestheader_uid_headers),
            group_headers: lower(&config.requestheader_group_headers),
            extra_prefixes: lower(&config.requestheader_extra_headers_prefix),
        })
    }

    /// `None` when the caller is no proxy or names no user.
    pub fn user(
        &self,
        headers: &HeaderMap,
        chain: &[CertificateDer<'static>],
    ) -> Result<Option<UserInfo>, CertificateError> {
        let Some(name) = first(headers, &self.username_headers) else { return Ok(None) };
        let Some(proxy) = self.authorities.user(chain)? else { return Ok(None) };
        if !self.allowed_names.is_empty() && !self.allowed_names.contains(&proxy.name) {
            return Ok(None);
        }
        let groups = self.group_headers.iter().flat_map(|header| values(headers, header)).collect();
        let uid = first(headers, &self.uid_headers).unwrap_or_default();
        let mut user = UserInfo { name, uid, groups, ..UserInfo::default() };
        for key in headers.keys() {
            let Some(extra) = self.extra_prefixes.iter().find_map(|prefix| key.as_str().strip_prefix(prefix.as_str()))
            else {
                continue;
            };
            user.extra.entry(unescape(extra)).or_default().extend(values(headers, key.as_str()));
        }
        Ok(Some(user))
    }
}

/// An extra key as it is after percent decoding; malformed escapes stay as they are.
pub fn unescape(key: &str) -> String {
    percent_encoding::percent_decode_str(key)
        .decode_utf8()
        .map_or_else(|_| key.to_owned(), std::borrow::Cow::into_owned)
}

/// The values of a header that are text.
pub fn values(headers: &HeaderMap, name: &str) -> Vec<String> {
    headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).map(str::to_owned).collect()
}

fn first(headers: &HeaderMap, names: &[String]) -> Option<String> {
    names.iter().flat_map(|name| values(headers, name)).find(|value| !value.is_empty())
}
