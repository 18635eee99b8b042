//! Semantic versions: `semver("1.2.3")`, compared by precedence.

use cel::common::types::{CelBool, CelInt, CelString};
use cel::common::value::Val;
use cel::{DeclarationError, Env, ExecutionError};
use semver::Version;

use super::{failure, value_type};

#[derive(Clone, Debug)]
struct Semver(Version);

value_type!(Semver, "kubernetes.Semver");

/// What is said of the build does not count.
impl PartialEq for Semver {
    fn eq(&self, other: &Self) -> bool {
        self.0.cmp_precedence(&other.0).is_eq()
    }
}

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(Semver::cel_type().to_owned())?;
    cel::add_overload!(env, fn exact: (CelString) -> Result<Semver>, name = "semver")?;
    cel::add_overload!(env, fn normalized: (CelString, CelBool) -> Result<Semver>, name = "semver")?;
    cel::add_overload!(env, fn is_exact: (CelString) -> CelBool, name = "isSemver")?;
    cel::add_overload!(env, fn is_normalized: (CelString, CelBool) -> CelBool, name = "isSemver")?;
    cel::add_member_overload!(env, fn is_greater_than: (Semver, Semver) -> CelBool)?;
    cel::add_member_overload!(env, fn is_less_than: (Semver, Semver) -> CelBool)?;
    cel::add_member_overload!(env, fn compare_to: (Semver, Semver) -> CelInt)?;
    cel::add_member_overload!(env, fn major: (Semver) -> Result<CelInt>)?;
    cel::add_member_overload!(env, fn minor: (Semver) -> Result<CelInt>)?;
    cel::add_member_overload!(env, fn patch: (Semver) -> Result<CelInt>)
}

fn parse(text: &str, normalize: bool) -> Result<Semver, String> {
    let text = if normalize { complete(text)? } else { text.to_owned() };
    Version::parse(&text).map(Semver).map_err(|error| error.to_string())
}

/// Lets a leading `v`, zeros before numbers and missing parts pass.
fn complete(text: &str) -> Result<String, String> {
    let text = text.strip_prefix('v').unwrap_or(text);
    let mut parts: Vec<String> = text.splitn(3, '.').map(without_zeros).collect();
    let is_short = parts.len() < 3;
    if is_short && parts.last().is_some_and(|last| last.contains(['+', '-'])) {
        return Err("short version cannot contain PreRelease/Build meta data".into());
    }
    parts.resize(3, "0".into());
    Ok(parts.join("."))
}

fn without_zeros(part: &str) -> String {
    let rest = part.trim_start_matches('0');
    if part.len() < 2 || rest.len() == part.len() {
        part.to_owned()
    } else if rest.starts_with(|first: char| first.is_ascii_digit()) {
        rest.to_owned()
    } else {
        format!("0{rest}")
    }
}

fn exact(text: &CelString<'_>) -> Result<Semver, ExecutionError> {
    parse(text.inner(), false).map_err(|why| failure("semver", why))
}

fn normalized(text: &CelString<'_>, normalize: &CelBool) -> Result<Semver, ExecutionError> {
    parse(text.inner(), *normalize.inner()).map_err(|why| failure("semver", why))
}

fn is_exact(text: &CelString<'_>) -> CelBool {
    parse(text.inner(), false).is_ok().into()
}

fn is_normalized(text: &CelString<'_>, normalize: &CelBool) -> CelBool {
    parse(text.inner(), *normalize.inner()).is_ok().into()
}

fn is_greater_than(version: &Semver, other: &Semver) -> CelBool {
    version.0.cmp_precedence(&other.0).is_gt().into()
}

fn is_less_than(version: &Semver, other: &Semver) -> CelBool {
    version.0.cmp_precedence(&other.0).is_lt().into()
}

fn compare_to(version: &Semver, other: &Semver) -> CelInt {
    CelInt::from(version.0.cmp_precedence(&other.0) as i64)
}

fn number(part: u64) -> Result<CelInt, ExecutionError> {
    i64::try_from(part).map(CelInt::from).map_err(|error| failure("semver", error))
}

fn major(version: &Semver) -> Result<CelInt, ExecutionError> {
    number(version.0.major)
}

fn minor(version: &Semver) -> Result<CelInt, ExecutionError> {
    number(version.0.minor)
}

fn patch(version: &Semver) -> Result<CelInt, ExecutionError> {
    number(version.0.patch)
}
