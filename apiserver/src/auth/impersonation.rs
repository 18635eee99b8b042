//! `Impersonate-*` headers: whom the caller wants to be, and whether the caller may. Every name, group, uid and extra
//! value is authorized on its own, as verb `impersonate`.

use apimachinery::status::Status;
use http::HeaderMap;

use super::front_proxy::{unescape, values};
use super::service_account::{groups, split_username};
use super::{ANONYMOUS, AUTHENTICATED, Attributes, Decision, UNAUTHENTICATED, UserInfo};

const USER: &str = "impersonate-user";
const UID: &str = "impersonate-uid";
const GROUP: &str = "impersonate-group";
const EXTRA_PREFIX: &str = "impersonate-extra-";

/// The user to go on as: the caller itself when no header asks for another.
pub fn impersonate(
    caller: UserInfo,
    headers: &HeaderMap,
    authorize: impl Fn(&Attributes<'_>) -> Decision,
) -> Result<UserInfo, Status> {
    let first = |name| values(headers, name).into_iter().next().unwrap_or_default();
    let (name, uid, asked_groups) = (first(USER), first(UID), values(headers, GROUP));
    let extras: Vec<(String, Vec<String>)> = headers
        .keys()
        .filter_map(|key| Some((unescape(key.as_str().strip_prefix(EXTRA_PREFIX)?), values(headers, key.as_str()))))
        .collect();
    if name.is_empty() {
        if uid.is_empty() && asked_groups.is_empty() && extras.is_empty() {
            return Ok(caller);
        }
        // As Go prints the user that it made of the headers.
        let list = match asked_groups.as_slice() {
            [] => "[]string(nil)".to_owned(),
            groups => format!("[]string{{{}}}", groups.iter().map(|g| format!("{g:?}")).collect::<Vec<_>>().join(", ")),
        };
        let extra = if extras.is_empty() { "(nil)" } else { "{…}" };
        return Err(Status::bad_request(format!(
            "requested &user.DefaultInfo{{Name:\"\", UID:{uid:?}, Groups:{list}, Extra:map[string][]string{extra}}} without impersonating a user name"
        )));
    }
    let check = |attributes: Attributes<'_>| match authorize(&attributes) {
        Decision::Allow(_) => Ok(()),
        refusal => Err(attributes.forbidden(refusal.reason())),
    };
    let ask = |group, resource| Attributes::resource(&caller, "impersonate", group, resource);
    let mut user = UserInfo { name: name.clone(), groups: asked_groups.clone(), ..UserInfo::default() };
    match split_username(&name) {
        Some((namespace, account)) => {
            check(Attributes { namespace, name: account, api_version: "v1", ..ask("", "serviceaccounts") })?;
            if asked_groups.is_empty() {
                user.groups = groups(namespace);
            }
        }
        None => check(Attributes { name: &name, ..ask("", "users") })?,
    }
    for group in &asked_groups {
        check(Attributes { name: group, ..ask("", "groups") })?;
    }
    for (key, values) in extras {
        for value in &values {
            let attributes = Attributes {
                name: value,
                subresource: &key,
                api_version: "v1",
                ..ask("authentication.k8s.io", "userextras")
            };
            check(attributes)?;
        }
        user.extra.entry(key).or_default().extend(values);
    }
    if !uid.is_empty() {
        check(Attributes { name: &uid, api_version: "v1", ..ask("authentication.k8s.io", "uids") })?;
        user.uid = uid;
    }
    add_group_of_everybody(&mut user);
    Ok(user)
}

/// Who is somebody is in `system:authenticated`, unless the groups already say which of the two it is.
pub fn add_group_of_everybody(user: &mut UserInfo) {
    let in_group = |wanted: &str| user.groups.iter().any(|group| group == wanted);
    let missing = match user.name == ANONYMOUS {
        true => (!in_group(UNAUTHENTICATED)).then_some(UNAUTHENTICATED),
        false => (!in_group(AUTHENTICATED) && !in_group(UNAUTHENTICATED)).then_some(AUTHENTICATED),
    };
    user.groups.extend(missing.map(str::to_owned));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_as(headers: &[(&str, &str)], may: &[&str]) -> Result<UserInfo, Status> {
        let headers = headers.iter().map(|(k, v)| (k.parse().unwrap(), v.parse().unwrap())).collect();
        let caller = UserInfo { name: "root".into(), ..UserInfo::default() };
        impersonate(caller, &headers, |attributes| {
            let asked = format!("{} {}", attributes.combined_resource(), attributes.name);
            if may.contains(&asked.as_str()) { Decision::Allow(String::new()) } else { Decision::none() }
        })
    }

    #[test]
    fn every_part_is_authorized() {
        assert_eq!(try_as(&[], &[]).unwrap().name, "root");
        let user = try_as(&[("impersonate-user", "jane")], &["users jane"]).unwrap();
        assert_eq!((user.name.as_str(), user.groups.as_slice()), ("jane", [AUTHENTICATED.to_owned()].as_slice()));
        let refusal = try_as(&[("impersonate-user", "jane"), ("impersonate-group", "g")], &["users jane"]).unwrap_err();
        assert_eq!(
            refusal.message,
            r#"groups "g" is forbidden: User "root" cannot impersonate resource "groups" in API group "" at the cluster scope"#
        );
        let account = ("impersonate-user", "system:serviceaccount:a:b");
        assert_eq!(try_as(&[account], &["serviceaccounts b"]).unwrap().groups.len(), 3);
        let extra = ("impersonate-extra-a%2fb", "v");
        assert_eq!(try_as(&[account, extra], &["serviceaccounts b", "userextras/a/b v"]).unwrap().extra["a/b"], ["v"]);
        assert_eq!(try_as(&[("impersonate-group", "g")], &[]).unwrap_err().code, 400);
    }
}
