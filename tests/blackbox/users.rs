//! Whom a container runs as, and in which groups; an exec session too.

use tonic::Code;

use crate::harness::*;

tests![
    the_images_user_by_name,
    the_images_user_by_id,
    the_images_group,
    an_id_of_the_config_wins,
    a_name_of_the_config_wins,
    groups_of_the_image_are_merged,
    the_strict_policy_leaves_the_images_groups_out,
    the_daemons_groups_are_cleared,
    users_that_there_are_not,
    bad_ids_are_refused,
];

fn set(value: i64) -> Option<cri::Int64Value> {
    Some(cri::Int64Value { value })
}

/// Expects these ids and groups of the first process and of an exec session, and in the status.
async fn expect(
    daemon: &Daemon,
    ids: (u64, u64),
    groups: &[u64],
    change: impl FnOnce(&mut cri::ContainerConfig),
) -> Result<()> {
    let pod = daemon.pod(|_| {}).await?;
    let reports = pod.probes(change).await?;
    for (report, who) in reports.iter().zip(["init", "exec"]) {
        assert_eq!(
            report.numbers("ids"),
            [ids.0, ids.0, ids.1, ids.1],
            "ids of {who}"
        );
        assert_eq!(report.groups(), groups, "groups of {who}");
    }
    let request = cri::ListContainersRequest {
        filter: Some(cri::ContainerFilter {
            pod_sandbox_id: pod.id.clone(),
            ..Default::default()
        }),
    };
    let id = daemon
        .runtime()
        .list_containers(request)
        .await?
        .into_inner()
        .containers[0]
        .id
        .clone();
    let request = cri::ContainerStatusRequest {
        container_id: id,
        verbose: false,
    };
    let status = daemon
        .runtime()
        .container_status(request)
        .await?
        .into_inner()
        .status
        .unwrap();
    let user = status.user.unwrap().linux.unwrap();
    assert_eq!(
        (user.uid, user.gid),
        (ids.0.cast_signed(), ids.1.cast_signed()),
        "in the status"
    );
    let mut told: Vec<u64> = user
        .supplemental_groups
        .iter()
        .map(|g| g.cast_unsigned())
        .collect();
    told.sort_unstable();
    assert_eq!(told, groups, "in the status");
    Ok(())
}

async fn with_image(env: &Env, name: &'static str, ids: (u64, u64), groups: &[u64]) -> Result<()> {
    let daemon = env.bare_daemon().await?;
    daemon.pull(name).await?;
    expect(&daemon, ids, groups, |c| {
        c.image.as_mut().unwrap().image = image(name)
    })
    .await
}

async fn the_images_user_by_name(env: Env) -> Result<()> {
    with_image(&env, "user-name", (1000, 1000), &[1000]).await
}

async fn the_images_user_by_id(env: Env) -> Result<()> {
    // No entry in /etc/passwd: group 0.
    with_image(&env, "user-id", (1234, 0), &[0]).await
}

async fn the_images_group(env: Env) -> Result<()> {
    with_image(&env, "user-group", (1000, 50), &[50]).await
}

async fn an_id_of_the_config_wins(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pull("user-name").await?;
    let change = |c: &mut cri::ContainerConfig| {
        c.image.as_mut().unwrap().image = image("user-name");
        container_security(c).run_as_user = set(65534);
    };
    // nobody is in extra2 by the image's /etc/group.
    expect(&daemon, (65534, 65534), &[2002, 65534], change).await?;
    let change = |c: &mut cri::ContainerConfig| {
        let security = container_security(c);
        (security.run_as_user, security.run_as_group) = (set(4000), set(5000));
    };
    expect(&daemon, (4000, 5000), &[5000], change).await
}

async fn a_name_of_the_config_wins(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    expect(&daemon, (1000, 1000), &[1000], |c| {
        container_security(c).run_as_username = "app".into()
    })
    .await?;
    // A number may stand where a name belongs.
    expect(&daemon, (1000, 1000), &[1000], |c| {
        container_security(c).run_as_username = "1000".into()
    })
    .await
}

async fn groups_of_the_image_are_merged(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let change = |c: &mut cri::ContainerConfig| {
        let security = container_security(c);
        security.run_as_username = "grouped".into();
        security.supplemental_groups = vec![3000, 2001];
    };
    expect(&daemon, (1001, 1001), &[1001, 2001, 2002, 3000], change).await
}

async fn the_strict_policy_leaves_the_images_groups_out(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let change = |c: &mut cri::ContainerConfig| {
        let security = container_security(c);
        security.run_as_username = "grouped".into();
        security.supplemental_groups = vec![3000];
        security.supplemental_groups_policy = cri::SupplementalGroupsPolicy::Strict.into();
    };
    expect(&daemon, (1001, 1001), &[1001, 3000], change).await?;
    let features = daemon
        .runtime()
        .status(cri::StatusRequest { verbose: false })
        .await?
        .into_inner()
        .features;
    assert!(features.context("features")?.supplemental_groups_policy);
    Ok(())
}

async fn the_daemons_groups_are_cleared(env: Env) -> Result<()> {
    // A daemon that is in group 4242 itself.
    nix::unistd::setgroups(&[nix::unistd::Gid::from_raw(4242)]).context("setgroups")?;
    let daemon = env.daemon().await;
    nix::unistd::setgroups(&[])?;
    let daemon = daemon?;
    let status = read(format!("/proc/{}/status", daemon.pid()?))?;
    if !status
        .lines()
        .any(|l| l.starts_with("Groups:") && l.contains("4242"))
    {
        return skip("the thread that starts the daemon has groups of its own");
    }
    let change = |c: &mut cri::ContainerConfig| container_security(c).run_as_user = set(4000);
    expect(&daemon, (4000, 0), &[0], change).await
}

async fn users_that_there_are_not(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    daemon.pull("user-missing").await?;
    let pod = daemon.pod(|_| {}).await?;
    let answer = pod
        .try_create(|c| c.image.as_mut().unwrap().image = image("user-missing"))
        .await;
    refused(answer, Code::InvalidArgument, &["who"]);
    let answer = pod
        .try_create(|c| container_security(c).run_as_username = "nobody-knows".into())
        .await;
    refused(answer, Code::InvalidArgument, &["nobody-knows"]);
    let request = cri::ListContainersRequest::default();
    assert_eq!(
        daemon
            .runtime()
            .list_containers(request)
            .await?
            .into_inner()
            .containers,
        []
    );
    Ok(())
}

async fn bad_ids_are_refused(env: Env) -> Result<()> {
    let daemon = env.daemon().await?;
    let pod = daemon.pod(|_| {}).await?;
    let changes: [Change<cri::LinuxContainerSecurityContext>; 5] = [
        ("a negative user", |s| s.run_as_user = set(-1)),
        ("a user beyond 32 bits", |s| s.run_as_user = set(1 << 32)),
        ("a negative group", |s| {
            (s.run_as_user, s.run_as_group) = (set(1), set(-5))
        }),
        ("a group without a user", |s| s.run_as_group = set(5)),
        ("a negative supplemental group", |s| {
            s.supplemental_groups = vec![-1]
        }),
    ];
    for (what, change) in changes {
        let answer = pod.try_create(|c| change(container_security(c))).await;
        assert_eq!(
            answer.expect_err(what).code(),
            Code::InvalidArgument,
            "{what}"
        );
    }
    Ok(())
}
