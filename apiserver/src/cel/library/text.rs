//! Regular expressions on strings, and `jsonpatch.escapeKey`.

use cel::common::types::{CelInt, CelList, CelString};
use cel::common::value::Val;
use cel::{DeclarationError, Env, ExecutionError};

use super::failure;
use crate::cel::regex_cache;

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    cel::add_member_overload!(env, fn find: (CelString, CelString) -> Result<CelString>)?;
    cel::add_member_overload!(env, fn find_all: (CelString, CelString) -> Result<CelList>)?;
    cel::add_member_overload!(env, fn find_some: (CelString, CelString, CelInt) -> Result<CelList>, name = "findAll")?;
    cel::add_overload!(env, fn escape_key: (CelString) -> CelString, name = "jsonpatch.escapeKey")
}

fn pattern(text: &str, function: &str) -> Result<regex::Regex, ExecutionError> {
    regex_cache::get(text).map_err(|error| failure(function, error))
}

fn find(text: &CelString<'_>, regex: &CelString<'_>) -> Result<CelString<'static>, ExecutionError> {
    let found = pattern(regex.inner(), "find")?;
    Ok(found.find(text.inner()).map_or("", |found| found.as_str()).to_owned().into())
}

fn find_all(text: &CelString<'_>, regex: &CelString<'_>) -> Result<CelList<'static>, ExecutionError> {
    find_some(text, regex, &CelInt::from(-1))
}

/// At most `limit` of them, all when it is negative.
fn find_some(text: &CelString<'_>, regex: &CelString<'_>, limit: &CelInt) -> Result<CelList<'static>, ExecutionError> {
    let pattern = pattern(regex.inner(), "findAll")?;
    let limit = usize::try_from(*limit.inner()).unwrap_or(usize::MAX);
    Ok(texts(pattern.find_iter(text.inner()).take(limit).map(|found| found.as_str().to_owned())))
}

/// A list of strings.
pub fn texts(texts: impl Iterator<Item = String>) -> CelList<'static> {
    texts.map(|text| Box::new(CelString::from(text)) as Box<dyn Val>).collect::<Vec<_>>().into()
}

/// A key as a step of a JSON pointer.
fn escape_key(key: &CelString<'_>) -> CelString<'static> {
    key.inner().replace('~', "~0").replace('/', "~1").into()
}
