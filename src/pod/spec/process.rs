//! What runs in a container: command, environment, working directory, user.

use crate::error::{Result, SpecError, quoted};
use oci_spec::image::Config as Image;
use slipway_proto::{cri, keeper};
use std::path::{Component, Path, PathBuf};

/// The search path of a container whose image and request set none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What the kernel takes as one argument (MAX_ARG_STRLEN).
const LONGEST_STRING: usize = 128 << 10;

/// The arguments: `command` replaces the image's Entrypoint and makes its Cmd void; `args` replaces Cmd.
pub(crate) fn arguments(config: &cri::ContainerConfig, image: &Image) -> Result<Vec<String>> {
    let entrypoint = image.entrypoint().clone().unwrap_or_default();
    // Images of old builders say "none" this way.
    let entrypoint = if entrypoint == [""] {
        Vec::new()
    } else {
        entrypoint
    };
    let mut all = if config.command.is_empty() {
        entrypoint
    } else {
        config.command.clone()
    };
    if !config.args.is_empty() {
        all.extend_from_slice(&config.args);
    } else if config.command.is_empty() {
        all.extend(image.cmd().clone().unwrap_or_default());
    }
    if all.is_empty() {
        let what = "no command: neither the request nor the image names one; set command or args";
        return Err(SpecError::invalid("command", what));
    }
    checked("command", &all)?;
    Ok(all)
}

/// Refuses arguments that the kernel would not take.
pub(crate) fn checked(field: &str, arguments: &[String]) -> Result<()> {
    for (i, argument) in arguments.iter().enumerate() {
        let what = match argument {
            a if a.contains('\0') => "has a NUL in it",
            a if a.len() >= LONGEST_STRING => "is longer than the kernel takes",
            _ => continue,
        };
        let text = format!("argument {i} ({}) {what}", quoted(argument));
        return Err(SpecError::invalid(field, text));
    }
    Ok(())
}

/// The environment as `KEY=VALUE`, each key once: PATH, HOSTNAME and, on a terminal, TERM unless they are set,
/// the image's, the request's. Values need not be UTF-8.
pub(crate) fn environment(
    config: &cri::ContainerConfig,
    image: &Image,
    hostname: &str,
    warnings: &mut Vec<String>,
) -> Result<Vec<Vec<u8>>> {
    let mut all = Environment(Vec::new());
    all.set(PATH.into());
    all.set(format!("HOSTNAME={hostname}").into_bytes());
    if config.tty {
        all.set(b"TERM=xterm".to_vec());
    }
    for entry in image.env().iter().flatten() {
        let name = entry.split_once('=').map(|(name, _)| name);
        if name.is_none_or(str::is_empty) || entry.contains('\0') || entry.len() >= LONGEST_STRING {
            warnings.push(format!(
                "{} of the image's Env is no variable; left out",
                quoted(entry)
            ));
        } else {
            all.set(entry.clone().into_bytes());
        }
    }
    for (i, pair) in config.envs.iter().enumerate() {
        all.set(variable(&format!("envs[{i}]"), &pair.key, &pair.value)?);
    }
    Ok(all.0)
}

/// One variable as `KEY=VALUE`, if it can be one.
pub(crate) fn variable(field: &str, key: &str, value: &[u8]) -> Result<Vec<u8>> {
    let what = match key {
        "" => "has no name",
        key if key.contains('=') => "has a = in its name",
        key if key.contains('\0') || value.contains(&0) => "has a NUL in it",
        key if key.len() + value.len() + 1 >= LONGEST_STRING => "is longer than the kernel takes",
        _ => return Ok([key.as_bytes(), b"=", value].concat()),
    };
    Err(SpecError::invalid(field, format!("{} {what}", quoted(key))))
}

struct Environment(Vec<Vec<u8>>);

impl Environment {
    fn set(&mut self, entry: Vec<u8>) {
        let name = |entry: &[u8]| {
            entry
                .iter()
                .position(|b| *b == b'=')
                .map(|end| entry[..end].to_vec())
        };
        let wanted = name(&entry);
        match self.0.iter_mut().find(|old| name(old) == wanted) {
            Some(old) => *old = entry,
            None => self.0.push(entry),
        }
    }
}

/// Where the process starts: the request's directory, else the image's, else `/`. `..` is resolved by
/// name alone, so that the directory can be made.
pub(crate) fn working_dir(config: &cri::ContainerConfig, image: &Image) -> Result<String> {
    let (dir, own) = match (&config.working_dir, image.working_dir()) {
        (own, _) if !own.is_empty() => (own.clone(), true),
        // As Docker has it, an image's directory is meant from the root.
        (_, Some(dir)) => (format!("/{dir}"), false),
        _ => return Ok("/".to_owned()),
    };
    let field = if own {
        "working_dir"
    } else {
        "working directory of the image"
    };
    if own && !dir.starts_with('/') {
        let what = format!("{} must be an absolute path", quoted(&dir));
        return Err(SpecError::invalid(field, what));
    }
    if dir.chars().any(char::is_control) || dir.len() > 4095 {
        let what = format!(
            "{} is no path: too long, or a control character in it",
            quoted(&dir)
        );
        return Err(SpecError::invalid(field, what));
    }
    let mut out = PathBuf::from("/");
    for component in Path::new(&dir).components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => drop(out.pop()),
            _ => {}
        }
    }
    Ok(out.to_string_lossy().into_owned())
}

const SECURITY: &str = "linux.security_context";

/// Whom the process runs as; names are resolved in the root file system by the creator.
pub(crate) fn user(
    security: Option<&cri::LinuxContainerSecurityContext>,
    image: &Image,
) -> Result<keeper::User> {
    let mut user = keeper::User {
        image_user: image.user().clone().unwrap_or_default(),
        ..Default::default()
    };
    if user.image_user.contains('\0') || user.image_user.contains('\n') {
        let what = format!("{} is no user", quoted(&user.image_user));
        return Err(SpecError::invalid("user of the image", what));
    }
    let Some(security) = security else {
        return Ok(user);
    };
    let id = |field: String, value: i64| match u32::try_from(value) {
        // The largest means "unchanged" to the kernel.
        Ok(id) if id != u32::MAX => Ok(value),
        _ => {
            let what = format!("{value} is no id; it must be between 0 and 4294967294");
            Err(SpecError::invalid(field, what))
        }
    };
    if let Some(value) = &security.run_as_user {
        user.run_as_user = Some(id(format!("{SECURITY}.run_as_user"), value.value)?);
    }
    user.run_as_username.clone_from(&security.run_as_username);
    if user.run_as_user.is_some() && !user.run_as_username.is_empty() {
        let what = "only one of run_as_user and run_as_username can be set";
        return Err(SpecError::invalid(
            format!("{SECURITY}.run_as_username"),
            what,
        ));
    }
    if user
        .run_as_username
        .chars()
        .any(|c| c == ':' || c.is_control())
    {
        let what = format!("{} is not a user's name", quoted(&user.run_as_username));
        return Err(SpecError::invalid(
            format!("{SECURITY}.run_as_username"),
            what,
        ));
    }
    if let Some(value) = &security.run_as_group {
        let field = format!("{SECURITY}.run_as_group");
        if user.run_as_user.is_none() && user.run_as_username.is_empty() {
            let what = "needs run_as_user or run_as_username";
            return Err(SpecError::invalid(field, what));
        }
        user.run_as_group = Some(id(field, value.value)?);
    }
    for (i, group) in security.supplemental_groups.iter().enumerate() {
        let group = id(format!("{SECURITY}.supplemental_groups[{i}]"), *group)?;
        user.supplemental_groups.push(group);
    }
    let policy = security.supplemental_groups_policy;
    user.strict_groups = match cri::SupplementalGroupsPolicy::try_from(policy) {
        Ok(policy) => policy == cri::SupplementalGroupsPolicy::Strict,
        Err(_) => {
            let what = format!("there is no policy {policy}");
            return Err(SpecError::invalid(
                format!("{SECURITY}.supplemental_groups_policy"),
                what,
            ));
        }
    };
    Ok(user)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|s| (*s).to_owned()).collect()
    }

    fn image(entrypoint: &[&str], cmd: &[&str]) -> Image {
        let mut image = Image::default();
        image.set_entrypoint((!entrypoint.is_empty()).then(|| strings(entrypoint)));
        image.set_cmd((!cmd.is_empty()).then(|| strings(cmd)));
        image
    }

    #[test]
    fn command_and_arguments() {
        type Case<'a> = (
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
            &'a [&'a str],
        );
        // entrypoint, cmd, command, args, result
        let cases: [Case<'_>; 12] = [
            (&["e"], &["c"], &[], &[], &["e", "c"]),
            (&["e"], &["c"], &["x"], &[], &["x"]),
            (&["e"], &["c"], &[], &["y"], &["e", "y"]),
            (&["e"], &["c"], &["x"], &["y"], &["x", "y"]),
            (&[], &["c"], &[], &[], &["c"]),
            (&[], &["c"], &[], &["y"], &["y"]),
            (&["e"], &[], &[], &[], &["e"]),
            (&[""], &["c"], &[], &[], &["c"]),
            (&[], &[], &["x"], &[], &["x"]),
            (&[], &[], &[], &["y"], &["y"]),
            (&[], &[], &[], &[], &[]),
            (&[""], &[], &[], &[], &[]),
        ];
        for (entrypoint, cmd, command, args, expected) in cases {
            let config = cri::ContainerConfig {
                command: strings(command),
                args: strings(args),
                ..Default::default()
            };
            let found = arguments(&config, &image(entrypoint, cmd));
            if expected.is_empty() {
                assert!(
                    found
                        .expect_err("nothing to run")
                        .to_string()
                        .contains("no command")
                );
            } else {
                assert_eq!(found, Ok(strings(expected)));
            }
        }
    }

    #[test]
    fn arguments_the_kernel_would_not_take() {
        for bad in ["a\0b".to_owned(), "x".repeat(LONGEST_STRING)] {
            let config = cri::ContainerConfig {
                args: vec![bad],
                ..Default::default()
            };
            assert!(arguments(&config, &image(&["e"], &[])).is_err());
        }
    }

    fn env(pairs: &[(&str, &[u8])], image_env: &[&str]) -> (Result<Vec<Vec<u8>>>, Vec<String>) {
        let pair = |(key, value): &(&str, &[u8])| cri::KeyValue {
            key: (*key).to_owned(),
            value: value.to_vec(),
        };
        let config = cri::ContainerConfig {
            envs: pairs.iter().map(pair).collect(),
            ..Default::default()
        };
        let mut image = Image::default();
        image.set_env(Some(strings(image_env)));
        let mut warnings = Vec::new();
        (
            environment(&config, &image, "host", &mut warnings),
            warnings,
        )
    }

    #[test]
    fn the_environment_is_merged() {
        let expect = |found: Result<Vec<Vec<u8>>>, expected: &[&[u8]]| {
            let expected: Vec<Vec<u8>> = expected.iter().map(|e| e.to_vec()).collect();
            assert_eq!(found, Ok(expected));
        };
        expect(env(&[], &[]).0, &[PATH.as_bytes(), b"HOSTNAME=host"]);
        expect(
            env(
                &[("A", b"2"), ("C", b"\xff\n=x"), ("A", b"3")],
                &["PATH=/p", "A=1", "B=b=c", "E="],
            )
            .0,
            &[
                b"PATH=/p",
                b"HOSTNAME=host",
                b"A=3",
                b"B=b=c",
                b"E=",
                b"C=\xff\n=x",
            ],
        );
        expect(
            env(&[("HOSTNAME", b"x"), ("PATH", b"")], &[]).0,
            &[b"PATH=", b"HOSTNAME=x"],
        );
        expect(
            env(&[("a.b-c d", b"1")], &[]).0,
            &[PATH.as_bytes(), b"HOSTNAME=host", b"a.b-c d=1"],
        );
    }

    #[test]
    fn bad_variables() {
        let cases: [(&str, &[u8]); 4] = [("", b"x"), ("a=b", b"x"), ("a\0", b"x"), ("a", b"x\0y")];
        for (key, value) in cases {
            let error = env(&[("OK", b""), (key, value)], &[]).0.expect_err(key);
            assert_eq!(error.field(), "envs[1]");
        }
        let (found, warnings) = env(&[], &["NOVALUE", "=x", "N\0=x"]);
        assert_eq!(found.expect("passed over").len(), 2);
        assert_eq!(warnings.len(), 3);
    }

    #[test]
    fn working_directories() {
        let at = |own: &str, of_image: Option<&str>| {
            let config = cri::ContainerConfig {
                working_dir: own.into(),
                ..Default::default()
            };
            let mut image = Image::default();
            image.set_working_dir(of_image.map(str::to_owned));
            working_dir(&config, &image).ok()
        };
        let some = |s: &str| Some(s.to_owned());
        assert_eq!(at("", None), some("/"));
        assert_eq!(at("", Some("")), some("/"));
        assert_eq!(at("", Some("/srv")), some("/srv"));
        assert_eq!(at("", Some("srv/x")), some("/srv/x"));
        assert_eq!(at("/a/b", Some("/srv")), some("/a/b"));
        assert_eq!(at("//a/./../../b/", None), some("/b"));
        assert_eq!(at("relative", None), None);
        assert_eq!(at("/a\0", None), None);
        assert_eq!(at("", Some("/a\nb")), None);
    }

    fn security() -> cri::LinuxContainerSecurityContext {
        cri::LinuxContainerSecurityContext::default()
    }

    fn int(value: i64) -> Option<cri::Int64Value> {
        Some(cri::Int64Value { value })
    }

    #[test]
    fn users() {
        let mut image = Image::default();
        image.set_user(Some("app:staff".to_owned()));
        assert_eq!(user(None, &image).expect("good").image_user, "app:staff");
        let request = cri::LinuxContainerSecurityContext {
            run_as_user: int(0),
            run_as_group: int(4_294_967_294),
            supplemental_groups: vec![1, 2],
            supplemental_groups_policy: cri::SupplementalGroupsPolicy::Strict.into(),
            ..security()
        };
        let found = user(Some(&request), &image).expect("good");
        assert_eq!(
            (found.run_as_user, found.run_as_group),
            (Some(0), Some(4_294_967_294))
        );
        assert_eq!(found.supplemental_groups, [1, 2]);
        assert!(found.strict_groups);
        let by_name = cri::LinuxContainerSecurityContext {
            run_as_username: "nobody".into(),
            run_as_group: int(5),
            ..security()
        };
        let found = user(Some(&by_name), &image).expect("good");
        assert_eq!(
            (found.run_as_username.as_str(), found.run_as_group),
            ("nobody", Some(5))
        );
    }

    #[test]
    fn wrong_users_are_named() {
        type Security = cri::LinuxContainerSecurityContext;
        let cases = [
            (
                Security {
                    run_as_group: int(1),
                    ..security()
                },
                "run_as_group",
            ),
            (
                Security {
                    run_as_user: int(-1),
                    ..security()
                },
                "run_as_user",
            ),
            (
                Security {
                    run_as_user: int(4_294_967_295),
                    ..security()
                },
                "run_as_user",
            ),
            (
                Security {
                    run_as_user: int(1),
                    run_as_group: int(-5),
                    ..security()
                },
                "run_as_group",
            ),
            (
                Security {
                    run_as_user: int(1),
                    run_as_username: "x".into(),
                    ..security()
                },
                "run_as_username",
            ),
            (
                Security {
                    run_as_username: "a:b".into(),
                    ..security()
                },
                "run_as_username",
            ),
            (
                Security {
                    run_as_username: "a\nb".into(),
                    ..security()
                },
                "run_as_username",
            ),
            (
                Security {
                    supplemental_groups: vec![0, -1],
                    ..security()
                },
                "supplemental_groups[1]",
            ),
            (
                Security {
                    supplemental_groups_policy: 9,
                    ..security()
                },
                "supplemental_groups_policy",
            ),
        ];
        for (security, field) in cases {
            let error = user(Some(&security), &Image::default()).expect_err(field);
            assert_eq!(error.field(), format!("{SECURITY}.{field}"));
        }
    }

    proptest! {
        #[test]
        fn working_directories_are_plain(own in "[./a]{0,12}", of_image in "[./a]{0,12}") {
            let config = cri::ContainerConfig { working_dir: own, ..Default::default() };
            let mut image = Image::default();
            image.set_working_dir(Some(of_image));
            if let Ok(dir) = working_dir(&config, &image) {
                prop_assert!(dir.starts_with('/') && !dir.contains("//"));
                prop_assert!(!dir.split('/').any(|n| n == ".." || n == "."));
            }
        }
    }
}
