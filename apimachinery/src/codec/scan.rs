//! A look into JSON text without building a tree: the members of one object as slices. It trusts that the text is
//! JSON (it came out of the store); on anything else it answers with an error, and never panics or recurses.

use std::borrow::Cow;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a JSON object at byte {0}")]
pub struct ScanError(pub usize);

/// One member of an object. `key` is as written, without its quotes; `start..end` is the whole member.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    pub key: &'a [u8],
    pub value: &'a [u8],
}

/// The members of the object that `text` is.
pub struct Members<'a> {
    text: &'a [u8],
    at: usize,
    first: bool,
}

/// Walks the members of the object in `text`.
pub fn members(text: &[u8]) -> Result<Members<'_>, ScanError> {
    let at = skip_space(text, 0);
    if text.get(at) != Some(&b'{') {
        return Err(ScanError(at));
    }
    Ok(Members { text, at: at + 1, first: true })
}

impl<'a> Iterator for Members<'a> {
    type Item = Result<Member<'a>, ScanError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.step() {
            Ok(member) => member.map(Ok),
            Err(error) => {
                self.at = self.text.len();
                self.text = &[];
                Some(Err(error))
            }
        }
    }
}

impl<'a> Members<'a> {
    fn step(&mut self) -> Result<Option<Member<'a>>, ScanError> {
        if self.text.is_empty() {
            return Ok(None);
        }
        let mut at = skip_space(self.text, self.at);
        match self.text.get(at) {
            Some(b'}') => {
                self.text = &[];
                return Ok(None);
            }
            Some(b',') if !self.first => at = skip_space(self.text, at + 1),
            Some(b'"') if self.first => {}
            _ => return Err(ScanError(at)),
        }
        self.first = false;
        let key_end = skip_string(self.text, at)?;
        let key = &self.text[at + 1..key_end - 1];
        at = skip_space(self.text, key_end);
        if self.text.get(at) != Some(&b':') {
            return Err(ScanError(at));
        }
        let start = skip_space(self.text, at + 1);
        let end = skip_value(self.text, start)?;
        self.at = end;
        Ok(Some(Member { key, value: &self.text[start..end] }))
    }
}

/// The elements of the list that `text` is; a value that is no list has none.
pub fn elements(text: &[u8]) -> Vec<&[u8]> {
    let mut found = Vec::new();
    if text.first() != Some(&b'[') {
        return found;
    }
    let mut at = skip_space(text, 1);
    while at < text.len() && text[at] != b']' {
        let Ok(end) = skip_value(text, at) else { return found };
        found.push(&text[at..end]);
        at = skip_space(text, end);
        if text.get(at) == Some(&b',') {
            at = skip_space(text, at + 1);
        }
    }
    found
}

/// The value at a path of keys.
pub fn find<'a, 'p>(text: &'a [u8], path: impl IntoIterator<Item = &'p str>) -> Option<&'a [u8]> {
    path.into_iter().try_fold(text, |text, key| {
        members(text).ok()?.map_while(Result::ok).find(|member| member.key == key.as_bytes()).map(|member| member.value)
    })
}

/// An object that is asked many things: every part of the text is walked once.
pub struct Outline<'a> {
    members: Vec<Member<'a>>,
    /// The members of those members that were asked about.
    inner: Vec<(&'a [u8], Vec<Member<'a>>)>,
}

impl<'a> Outline<'a> {
    pub fn read(text: &'a [u8]) -> Result<Self, ScanError> {
        Ok(Self { members: members(text)?.collect::<Result<_, _>>()?, inner: Vec::new() })
    }

    pub fn members(&self) -> &[Member<'a>] {
        &self.members
    }

    /// The value at a dotted path, as [`find`] has it.
    pub fn find(&mut self, path: &str) -> Option<&'a [u8]> {
        let mut keys = path.split('.');
        let outer = value_of(&self.members, keys.next()?)?;
        let Some(key) = keys.next() else { return Some(outer) };
        let known = self.inner.iter().position(|(text, _)| std::ptr::eq(*text, outer));
        let index = known.unwrap_or_else(|| {
            let all = members(outer).map(|all| all.map_while(Result::ok).collect()).unwrap_or_default();
            self.inner.push((outer, all));
            self.inner.len() - 1
        });
        find(value_of(&self.inner[index].1, key)?, keys)
    }
}

fn value_of<'a>(members: &[Member<'a>], key: &str) -> Option<&'a [u8]> {
    members.iter().find(|member| member.key == key.as_bytes()).map(|member| member.value)
}

/// The text of a string value, unescaped; other scalars as they are written; `None` for null, objects and lists.
pub fn scalar(value: &[u8]) -> Option<Cow<'_, str>> {
    match value.first()? {
        b'"' if !value.contains(&b'\\') => std::str::from_utf8(&value[1..value.len() - 1]).ok().map(Cow::Borrowed),
        b'"' => serde_json::from_slice::<String>(value).ok().map(Cow::Owned),
        b'{' | b'[' | b'n' => None,
        _ => std::str::from_utf8(value).ok().map(Cow::Borrowed),
    }
}

pub(crate) fn skip_space(text: &[u8], mut at: usize) -> usize {
    while matches!(text.get(at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
        at += 1;
    }
    at
}

/// `at` is at the opening quote; the answer is just after the closing one.
pub(crate) fn skip_string(text: &[u8], at: usize) -> Result<usize, ScanError> {
    if text.get(at) != Some(&b'"') {
        return Err(ScanError(at));
    }
    let mut i = at + 1;
    while let Some(byte) = text.get(i) {
        match byte {
            b'"' => return Ok(i + 1),
            b'\\' => i += 2,
            _ => i += 1,
        }
    }
    Err(ScanError(at))
}

pub(crate) fn skip_value(text: &[u8], at: usize) -> Result<usize, ScanError> {
    match text.get(at) {
        Some(b'"') => skip_string(text, at),
        Some(b'{' | b'[') => {
            let mut depth = 0usize;
            let mut i = at;
            while let Some(byte) = text.get(i) {
                match byte {
                    b'"' => {
                        i = skip_string(text, i)?;
                        continue;
                    }
                    b'{' | b'[' => depth += 1,
                    b'}' | b']' => {
                        depth -= 1;
                        if depth == 0 {
                            return Ok(i + 1);
                        }
                    }
                    _ => {}
                }
                i += 1;
            }
            Err(ScanError(at))
        }
        Some(_) => {
            let mut i = at;
            while text.get(i).is_some_and(|b| !matches!(b, b',' | b'}' | b']' | b' ' | b'\t' | b'\n' | b'\r')) {
                i += 1;
            }
            if i == at { Err(ScanError(at)) } else { Ok(i) }
        }
        None => Err(ScanError(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(text: &str) -> Result<Vec<(String, String)>, ScanError> {
        members(text.as_bytes())?
            .map(|m| m.map(|m| (String::from_utf8_lossy(m.key).into(), String::from_utf8_lossy(m.value).into())))
            .collect()
    }

    #[test]
    fn members_are_found_whole() {
        let text = r#" { "a" : 1 , "b":{"x":[1,"]}\""]},"c":"q\"}" , "d":null}"#;
        let expected = [("a", "1"), ("b", r#"{"x":[1,"]}\""]}"#), ("c", r#""q\"}""#), ("d", "null")];
        assert_eq!(keys(text), Ok(expected.map(|(k, v)| (k.to_owned(), v.to_owned())).to_vec()));
        assert_eq!(keys("{}"), Ok(vec![]));
    }

    #[test]
    fn broken_text_is_an_error() {
        for text in ["", "[", "{", r#"{"a""#, r#"{"a":"#, r#"{"a":{"#, r#"{"a":"\"#, r#"{,"a":1}"#, r#"{"a":}"#] {
            assert!(keys(text).is_err(), "{text}");
        }
    }

    #[test]
    fn paths_and_scalars() {
        let text = br#"{"spec":{"nodeName":"n\u0031","on":true,"list":["a", {"b":[1]} ,2]}}"#;
        let value = |path: &'static str| find(text, path.split('.')).and_then(scalar).map(Cow::into_owned);
        assert_eq!(value("spec.nodeName").as_deref(), Some("n1"));
        assert_eq!(value("spec.on").as_deref(), Some("true"));
        assert_eq!(value("spec.none"), None);
        assert_eq!(elements(find(text, ["spec", "list"]).expect("list")).len(), 3);
        let mut outline = Outline::read(text).expect("an object");
        for path in
            ["spec", "spec.nodeName", "spec.on", "spec.none", "spec.on.x", "none", "spec.list.x", "spec.nodeName"]
        {
            assert_eq!(outline.find(path), find(text, path.split('.')), "{path}");
        }
        assert_eq!(outline.inner.len(), 1, "the inner object was walked once");
    }
}
