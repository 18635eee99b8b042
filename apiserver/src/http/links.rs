//! Links of proxied pages: those to the backend's own paths are led back through this server. The rest of a page is
//! passed on byte by byte, and what is not understood is left alone; pages are taken for UTF-8.

/// Which attributes of which elements hold a link.
const LINKS: [(&str, &[&str]); 25] = [
    ("a", &["href"]),
    ("applet", &["codebase"]),
    ("area", &["href"]),
    ("audio", &["src"]),
    ("base", &["href"]),
    ("blockquote", &["cite"]),
    ("body", &["background"]),
    ("button", &["formaction"]),
    ("command", &["icon"]),
    ("del", &["cite"]),
    ("embed", &["src"]),
    ("form", &["action"]),
    ("frame", &["longdesc", "src"]),
    ("head", &["profile"]),
    ("html", &["manifest"]),
    ("iframe", &["longdesc", "src"]),
    ("img", &["longdesc", "src", "usemap"]),
    ("input", &["src", "usemap", "formaction"]),
    ("ins", &["cite"]),
    ("link", &["href"]),
    ("object", &["classid", "codebase", "data", "usemap"]),
    ("q", &["cite"]),
    ("script", &["src"]),
    ("source", &["src"]),
    ("video", &["poster", "src"]),
];

/// Elements whose content is text, whatever it looks like.
const RAW: [&str; 4] = ["script", "style", "textarea", "title"];

/// The link as it leads through the proxy at `prefix`, or `None` when it does so already or leads elsewhere.
/// `base` is scheme and host of the backend.
pub fn through_proxy(link: &str, base: &str, prefix: &str) -> Option<String> {
    let path = link.strip_prefix(base).unwrap_or(link);
    let is_own = path.starts_with('/') && !path.starts_with("//") && !path.starts_with(prefix);
    is_own.then(|| format!("{prefix}{path}"))
}

/// The page with its links through the proxy.
pub fn rewrite(page: &str, base: &str, prefix: &str) -> String {
    let mut out = String::with_capacity(page.len() + 256);
    let mut rest = page;
    while let Some(at) = rest.find('<') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        if rest.starts_with("<!--") {
            rest = copy_until(rest, rest.find("-->"), &mut out);
            continue;
        }
        let name_end = rest[1..].find(|c: char| !c.is_ascii_alphanumeric()).map_or(rest.len(), |end| end + 1);
        let name = rest[1..name_end].to_ascii_lowercase();
        out.push_str(&rest[..name_end]);
        rest = &rest[name_end..];
        if !name.starts_with(|c: char| c.is_ascii_alphabetic()) {
            continue;
        }
        let links = LINKS.iter().find(|(element, _)| *element == name).map_or(&[][..], |(_, links)| links);
        rest = attributes(
            rest,
            |attribute, value| {
                let is_link = links.iter().any(|link| attribute.eq_ignore_ascii_case(link));
                is_link.then(|| through_proxy(value, base, prefix)).flatten()
            },
            &mut out,
        );
        if RAW.contains(&name.as_str()) {
            rest = copy_until(rest, end_of_raw(rest, &name), &mut out);
        }
    }
    out.push_str(rest);
    out
}

/// Copies up to `at`, or all; answers what is left.
fn copy_until<'p>(text: &'p str, at: Option<usize>, out: &mut String) -> &'p str {
    let (copied, rest) = text.split_at(at.unwrap_or(text.len()));
    out.push_str(copied);
    rest
}

fn end_of_raw(text: &str, name: &str) -> Option<usize> {
    let closes = |at: &usize| {
        let after = text.get(at + 2..at + 2 + name.len());
        after.is_some_and(|after| after.eq_ignore_ascii_case(name))
    };
    text.match_indices("</").map(|(at, _)| at).find(closes)
}

/// Copies the attributes of a tag up to its `>`, with new values where `change` has some; answers what is left.
fn attributes<'p>(tag: &'p str, change: impl Fn(&str, &str) -> Option<String>, out: &mut String) -> &'p str {
    let mut rest = tag;
    loop {
        let start = rest.find(|c: char| !c.is_ascii_whitespace() && c != '/');
        rest = copy_until(rest, start, out);
        if rest.is_empty() || rest.starts_with('>') {
            return rest;
        }
        // A stray `=` begins a name; so every turn takes at least one byte.
        let first = rest.chars().next().map_or(0, char::len_utf8);
        let is_end = |c: char| c.is_ascii_whitespace() || matches!(c, '=' | '>' | '/');
        let name_end = rest[first..].find(is_end).map_or(rest.len(), |end| end + first);
        let name = &rest[..name_end];
        rest = copy_until(rest, Some(name_end), out);
        let Some(assigned) = rest.trim_ascii_start().strip_prefix('=') else { continue };
        let value = assigned.trim_ascii_start();
        out.push_str(&rest[..rest.len() - value.len()]);
        let quote = value.chars().next().filter(|c| matches!(c, '"' | '\''));
        let (value, after) = match quote {
            Some(quote) => {
                out.push(quote);
                let quoted = &value[1..];
                quoted.split_at(quoted.find(quote).unwrap_or(quoted.len()))
            }
            None => value.split_at(value.find(|c: char| c.is_ascii_whitespace() || c == '>').unwrap_or(value.len())),
        };
        out.push_str(change(name, value).as_deref().unwrap_or(value));
        rest = if quote.is_some() { copy_until(after, Some(after.len().min(1)), out) } else { after };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_the_backend_lead_through_the_proxy() {
        for (page, expected) in [
            (r#"<a href="/rewriteme">test</a>"#, r#"<a href="/p/proxy/rewriteme">test</a>"#),
            (r#"<A class='/x' HREF = '/y' >"#, r#"<A class='/x' HREF = '/p/proxy/y' >"#),
            ("<img src=/i.png alt=/x>", "<img src=/p/proxy/i.png alt=/x>"),
            ("<br/><img src='/i'/>", "<br/><img src='/p/proxy/i'/>"),
            (r#"<a href="http://10.0.0.1:80/a?b=/c">"#, r#"<a href="/p/proxy/a?b=/c">"#),
        ] {
            assert_eq!(rewrite(page, "http://10.0.0.1:80", "/p/proxy"), expected);
        }
    }

    #[test]
    fn the_rest_is_left_alone() {
        for page in [
            "",
            "<",
            "a < b, 1 <2 <é",
            r#"<a href="x"><a href="//h/x"><a href="http://other/x"><a href="/p/proxy/x"><p href="/x">"#,
            r#"<!-- <a href="/x"> --><script>"<a href='/x'>"</script>"#,
            r#"<style><a href="/x">"#,
            r#"<a href="/x"#.trim_end_matches("/x"),
            "<a href",
            "<a =é= href=",
            "<a href='é",
        ] {
            assert_eq!(rewrite(page, "http://10.0.0.1:80", "/p/proxy"), page);
        }
    }
}
