//! Compiled regular expressions, kept for a while: rules match with the same few again and again, and compiling costs a
//! thousand times what matching does.

use std::cell::RefCell;
use std::collections::VecDeque;

use regex::Regex;

/// For each thread.
const KEPT: usize = 64;

thread_local! {
    static CACHE: RefCell<VecDeque<Regex>> = const { RefCell::new(VecDeque::new()) };
}

pub fn get(pattern: &str) -> Result<Regex, regex::Error> {
    CACHE.with_borrow_mut(|cache| {
        if let Some(known) = cache.iter().find(|known| known.as_str() == pattern) {
            return Ok(known.clone());
        }
        let compiled = Regex::new(pattern)?;
        cache.truncate(KEPT - 1);
        cache.push_front(compiled.clone());
        Ok(compiled)
    })
}
