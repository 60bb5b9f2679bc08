//! `WWW-Authenticate` headers (RFC 9110, section 11.6.1).

use std::collections::HashMap;

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};

/// One challenge: a scheme in lower case and its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    pub(super) scheme: String,
    /// Names in lower case.
    pub(super) parameters: HashMap<String, String>,
}

/// Every challenge in the headers; what can't be parsed is left out.
pub(super) fn parse(headers: &HeaderMap) -> Vec<Challenge> {
    headers
        .get_all(WWW_AUTHENTICATE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(parse_value)
        .collect()
}

/// A header holds challenges separated by commas, and so are the parameters of one: a word without
/// `=` begins a new challenge.
fn parse_value(text: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = text.trim_start_matches([' ', '\t', ',']);
    while !rest.is_empty() {
        let end = rest.find([' ', '\t', ',', '=']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let trimmed = after.trim_start();
        if let (Some(value), Some(challenge)) = (trimmed.strip_prefix('='), challenges.last_mut())
            && !word.is_empty()
        {
            let (value, after) = parse_parameter(value.trim_start());
            challenge
                .parameters
                .entry(word.to_ascii_lowercase())
                .or_insert(value);
            rest = after;
        } else if word.is_empty() {
            // A stray `=`.
            rest = &after[1..];
        } else {
            challenges.push(Challenge {
                scheme: word.to_ascii_lowercase(),
                parameters: HashMap::new(),
            });
            rest = after;
        }
        rest = rest.trim_start_matches([' ', '\t', ',']);
    }
    challenges
}

/// A token or a quoted string, and what follows it.
fn parse_parameter(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_parse() {
        let parsed = parse_value(
            r#"Bearer realm="https://auth.example/token?a=b,c",service="reg \"x\"",Scope="repository:a/b:pull,push", Basic realm=x"#,
        );
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[0].scheme, "bearer");
        assert_eq!(
            parsed[0].parameters["realm"],
            "https://auth.example/token?a=b,c"
        );
        assert_eq!(parsed[0].parameters["service"], r#"reg "x""#);
        assert_eq!(parsed[0].parameters["scope"], "repository:a/b:pull,push");
        assert_eq!(parsed[1].scheme, "basic");
        assert_eq!(parsed[1].parameters["realm"], "x");
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_or_loops(text in r#"[a-zA-Z =,"\\\t:é]{0,60}"#) {
            parse_value(&text);
        }
    }
}
