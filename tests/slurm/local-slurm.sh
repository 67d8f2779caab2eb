#!/bin/bash
# local-slurm.sh - a real Slurm cluster (1 login/controller + N compute nodes) on ONE Debian 12 host.
# Part of this project: the tests start it, and a person may. It needs nothing else of the repository.
#   install                  install Debian's packages where they are missing, and nothing else
#   up                       install packages if missing, (re)start whatever is not running, wait for idle
#   down                     kill everything this script started (nothing else); keeps logs
#   purge                    down + rm -rf the state dir
#   status                   machines, sinfo, squeue
#   exec [-n NODE] CMD...    run CMD on the login machine (or on NODE); e.g. exec sbatch job.sh
#   crash NODE               power the machine off (netns: kill -9 its PID 1; plain: kill -9 slurmd + its job steps)
#   killd NODE               kill -9 only its slurmd (job processes live on)
# Needs root. No systemd. Two modes:
#   netns  every node = own PID+net+UTS+mount namespace: own hostname, IP, ports, /dev/shm, PID space
#   plain  several "slurmd -N" on 127.0.0.1 (for containers without CAP_SYS_ADMIN); edits /etc/hosts
set -u
STATE=${LOCAL_SLURM_STATE:-/tmp/local-slurm}   # keep it SHORT: unix sockets below it must be < 108 chars
N=${LOCAL_SLURM_NODES:-2}                      # compute nodes
CPUS=${LOCAL_SLURM_CPUS:-4}                    # advertised per node; may exceed the hardware
MEM=${LOCAL_SLURM_MEM:-8000}                   # MB advertised per node
GPUS=${LOCAL_SLURM_GPUS:-2}                    # fake GPUs per node (0 = none)
MODE=${LOCAL_SLURM_MODE:-auto}                 # netns | plain | auto
CGROUP=${LOCAL_SLURM_CGROUP:-0}                # 1 = enforce --mem (cgroup v1 only; then one cluster per host)
DBD=${LOCAL_SLURM_DBD:-0}                      # 1 = mariadb + slurmdbd, so that sacct works
CRED=${LOCAL_SLURM_CRED_EXPIRE:-5}              # s; also the hold after a requeue. Slurm default 120; < 5 is taken as 120
NDT=${LOCAL_SLURM_SLURMD_TIMEOUT:-15}          # s until a silent node is DOWN (Slurm default: 300)
NET=10.77.0                                    # exists inside our own namespaces only
PFX=node
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
CLEAN=(env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8)

die() { echo "local-slurm: $*" >&2; exit 1; }
say() { echo "local-slurm: $*" >&2; }
[ "$(id -u)" = 0 ] || die "run as root"

# ---- processes we own: pid file = "PID STARTTIME", so that a reused PID is never killed -------------
stime() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
record() { echo "$2 $(stime "$2")" > "$STATE/run/$1.pid"; }
pid_of() { # prints the PID if it is alive and still ours
  local p s; read -r p s 2>/dev/null < "$STATE/run/$1.pid" || return 1
  [ -n "${p:-}" ] && [ "$(stime "$p")" = "${s:-x}" ] && echo "$p"; }
slay() { local p i; p=$(pid_of "$1") || { rm -f "$STATE/run/$1.pid"; return 0; }
  kill "-${2:-TERM}" "$p" 2>/dev/null
  for ((i = 0; i < 50; i++)); do pid_of "$1" >/dev/null || break; sleep 0.1; done
  p=$(pid_of "$1") && kill -9 "$p" 2>/dev/null
  rm -f "$STATE/run/$1.pid"; return 0; }

nodes() { local i; for ((i = 1; i <= N; i++)); do echo "$PFX$i"; done; }

probe_netns() { unshare -n -u -m -p -f --mount-proc bash -c \
  'ip link add br0 type bridge && ip link add veth0 type veth peer name veth1 && mount -t tmpfs t /mnt && hostname x' >/dev/null 2>&1; }

load_mode() { # the settings an existing state dir was made with win over the environment
  [ -f "$STATE/settings" ] && . "$STATE/settings"; return 0; }

install_pkgs() {
  local need=()
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null || need+=(slurm-wlm)
  command -v munged  >/dev/null || need+=(munge)
  command -v ip      >/dev/null || need+=(iproute2)
  command -v ps      >/dev/null || need+=(procps)
  [ "$DBD" = 1 ] && { command -v mariadbd >/dev/null || need+=(mariadb-server)
                      command -v slurmdbd >/dev/null || need+=(slurmdbd); }
  [ ${#need[@]} = 0 ] && return 0
  say "apt-get install ${need[*]}"
  local pol=/usr/sbin/policy-rc.d made=0   # packages must not start their own daemons
  [ -e $pol ] || { printf '#!/bin/sh\nexit 101\n' > $pol; chmod 755 $pol; made=1; }
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${need[@]}"; } \
    > "$STATE/log/apt.log" 2>&1
  local rc=$?; [ $made = 1 ] && rm -f $pol
  [ $rc = 0 ] || { tail -5 "$STATE/log/apt.log" >&2; die "apt-get failed"; }
}

write_config() {
  local host addr g="" gt="" i
  if [ "$MODE" = netns ]; then host=login addr=$NET.254; else host=$(hostname) addr=127.0.0.1; fi
  : > "$STATE/etc/gres.conf"
  if [ "$GPUS" -gt 0 ]; then
    gt="GresTypes=gpu"; g="Gres=gpu:$GPUS"
    # slurmd insists on a character device; links to /dev/null pass. Trailing digits = CUDA_VISIBLE_DEVICES
    for ((i = 0; i < GPUS; i++)); do ln -sfn /dev/null "$STATE/dev/fakegpu$i"; done
    echo "AutoDetect=off" > "$STATE/etc/gres.conf"
    echo "NodeName=$PFX[1-$N] Name=gpu File=$STATE/dev/fakegpu[0-$((GPUS - 1))]" | sed 's/\[0-0\]/0/' >> "$STATE/etc/gres.conf"
  fi
  {
  cat <<E
ClusterName=local
SlurmctldHost=$host($addr)
SlurmctldPort=$([ "$MODE" = netns ] && echo 6817 || echo 16817)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$STATE/munge/sock,cred_expire=$CRED
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/spool/%n
SlurmctldPidFile=$STATE/run/slurmctld.raw
SlurmdPidFile=$STATE/run/slurmd-%n.raw
SlurmctldLogFile=$STATE/log/slurmctld.log
SlurmdLogFile=$STATE/log/slurmd-%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/$([ "$CGROUP" = 1 ] && echo cgroup || echo linuxproc)
TaskPlugin=task/$([ "$CGROUP" = 1 ] && echo cgroup || echo none)
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
JobCompType=jobcomp/filetxt
JobCompLoc=$STATE/log/jobcomp.log
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=$((MEM / CPUS / 2))
$gt
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=0,sched_min_interval=0
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=$NDT
SlurmctldTimeout=30
MessageTimeout=10
BatchStartTimeout=10
KillWait=5
InactiveLimit=0
MinJobAge=86400
OverTimeLimit=0
PropagateResourceLimits=NONE
E
  [ "$DBD" = 1 ] && cat <<E
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$addr
AccountingStoragePort=16819
AccountingStoragePass=$STATE/munge/sock
AccountingStoreFlags=job_comment,job_env,job_script
$([ -n "$g" ] && echo AccountingStorageTRES=gres/gpu)
E
  for ((i = 1; i <= N; i++)); do
    if [ "$MODE" = netns ]; then echo "NodeName=$PFX$i NodeAddr=$NET.$i CPUs=$CPUS RealMemory=$MEM $g"
    else echo "NodeName=$PFX$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((16900 + i)) CPUs=$CPUS RealMemory=$MEM $g"; fi
  done
  # GraceTime: seconds between the SIGTERM/--signal of a preemption and the kill
  echo "PartitionName=main Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 State=UP"
  echo "PartitionName=high Nodes=ALL MaxTime=1-00:00:00 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP"
  } > "$STATE/etc/slurm.conf"
  [ "$CGROUP" = 1 ] && { [ -d /sys/fs/cgroup/freezer ] && [ -d /sys/fs/cgroup/memory ] || die "LOCAL_SLURM_CGROUP=1 needs cgroup v1"
    printf '%s\n' CgroupPlugin=cgroup/v1 CgroupMountpoint=/sys/fs/cgroup CgroupAutomount=no ConstrainRAMSpace=yes \
      ConstrainSwapSpace=no ConstrainCores=no ConstrainDevices=no > "$STATE/etc/cgroup.conf"; }
  {
    echo "127.0.0.1 localhost"
    [ "$MODE" = netns ] && { echo "$NET.254 login"; for ((i = 1; i <= N; i++)); do echo "$NET.$i $PFX$i"; done; }
  } > "$STATE/etc/hosts"
  [ "$DBD" = 1 ] && { cat > "$STATE/etc/slurmdbd.conf" <<E
AuthType=auth/munge
AuthInfo=socket=$STATE/munge/sock
DbdHost=$host
DbdAddr=$addr
DbdPort=16819
SlurmUser=root
LogFile=$STATE/log/slurmdbd.log
PidFile=$STATE/run/slurmdbd.raw
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=13306
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct
E
  chmod 600 "$STATE/etc/slurmdbd.conf"; }
  cat > "$STATE/init.sh" <<'E'
#!/bin/bash
# PID 1 of one simulated machine: sets it up, then only reaps orphans
hostname "$1"; ip link set lo up
mount --bind "$2/etc/hosts" /etc/hosts
mount --bind "$2/etc" /etc/slurm            # default config path: jobs need no SLURM_CONF
mount -t tmpfs -o mode=1777 shm /dev/shm
trap : TERM INT HUP
: > "$2/run/$1.ready"
while :; do sleep 3600 & wait $!; done
E
}

NS=(-m -u -n -p); [ -e /proc/self/ns/time ] && NS+=(-T)
# ---- machines ---------------------------------------------------------------------------------------
init_pid() { pid_of "machine-$1"; }
boot() { # NAME: netns machine; no-op if alive
  [ "$MODE" = netns ] || return 0
  init_pid "$1" >/dev/null && return 0
  local up p="" i; rm -f "$STATE/run/$1.ready" "$STATE/run/slurmd-$1.pid"
  mkdir -p /etc/slurm
  ( cd / && exec setsid "${CLEAN[@]}" unshare -n -u -m -p -f --mount-proc $(time_ns) \
      bash "$STATE/init.sh" "$1" "$STATE" </dev/null >"$STATE/log/machine-$1.log" 2>&1 ) &
  up=$!
  for ((i = 0; i < 100; i++)); do [ -e "$STATE/run/$1.ready" ] && break; sleep 0.05; done
  p=$(ps -o pid= --ppid "$up" | tr -d ' ')
  [ -n "$p" ] && [ -e "$STATE/run/$1.ready" ] || { cat "$STATE/log/machine-$1.log" >&2; die "machine $1 did not start"; }
  record "machine-$1" "$p"; disown "$up" 2>/dev/null
}
# own boot clock, so that slurmctld sees a crashed-and-restarted machine as rebooted (and requeues its jobs)
time_ns() { local o=(-T --boottime -$(($(cut -d. -f1 /proc/uptime) - 1)))
  unshare "${o[@]}" -f true 2>/dev/null && echo "${o[@]}"; return 0; }
in_ns() { local p; p=$(init_pid "$1") || die "machine $1 is down"; shift; nsenter -t "$p" "${NS[@]}" --wdns="$PWD" -- "$@"; }
wire() { # NAME OCTET: eth0 of the machine <-> bridge br0 on login
  [ "$MODE" = netns ] || return 0
  local p l; l=$(init_pid login) || die "no login"; p=$(init_pid "$1") || die "no $1"
  nsenter -t "$p" -n ip link show eth0 >/dev/null 2>&1 && return 0
  nsenter -t "$l" -n ip link del "v-$1" 2>/dev/null
  nsenter -t "$l" -n ip link add "v-$1" type veth peer name eth0 netns "$p" || die "veth for $1"
  nsenter -t "$l" -n ip link set "v-$1" master br0 up
  nsenter -t "$p" -n ip addr add "$NET.$2/24" dev eth0
  nsenter -t "$p" -n ip link set eth0 up
}
# run a daemonizing program on machine NAME and record its host PID. usage: daemon LABEL NAME CMD...
daemon() {
  local label=$1 name=$2 i p; shift 2
  pid_of "$label" >/dev/null && return 0
  rm -f "$STATE/run/$label.raw"
  if [ "$MODE" = netns ]; then ( cd / && in_ns "$name" "${CLEAN[@]}" "$@" ) </dev/null >>"$STATE/log/$label.out" 2>&1
  else ( cd / && "${CLEAN[@]}" SLURM_CONF="$STATE/etc/slurm.conf" "$@" ) </dev/null >>"$STATE/log/$label.out" 2>&1; fi \
    || { tail -5 "$STATE/log/$label.out" >&2; die "$label failed to start"; }
  for ((i = 0; i < 100; i++)); do [ -s "$STATE/run/$label.raw" ] && break; sleep 0.05; done
  p=$(cat "$STATE/run/$label.raw" 2>/dev/null)
  [ -n "$p" ] || die "$label wrote no pid file"
  [ "$MODE" = netns ] && p=$(to_host_pid "$name" "$p")
  record "$label" "$p"
}
to_host_pid() { # NAME PID-inside -> host PID
  local ns f; ns=$(readlink "/proc/$(init_pid "$1")/ns/pid")
  for f in /proc/[0-9]*; do
    [ "$(readlink "$f/ns/pid" 2>/dev/null)" = "$ns" ] || continue
    [ "$(awk '/^NSpid:/{print $NF}' "$f/status" 2>/dev/null)" = "$2" ] && { echo "${f#/proc/}"; return; }
  done; }

start_dbd() {
  [ "$DBD" = 1 ] || return 0
  local d=$STATE/mysql run=() ; [ "$MODE" = netns ] && run=(in_ns login)
  if [ ! -d "$d/mysql" ]; then
    say "mariadb-install-db"
    mariadb-install-db --no-defaults --user=root --datadir="$d" --skip-test-db --auth-root-authentication-method=normal \
      > "$STATE/log/mariadb-install.log" 2>&1 || die "mariadb-install-db failed"
  fi
  if ! pid_of mariadbd >/dev/null; then
    rm -f "$STATE/run/mariadbd.raw"
    ( cd / && "${run[@]}" "${CLEAN[@]}" setsid mariadbd --no-defaults --user=root --datadir="$d" --socket="$d/s" --port=13306 \
        --bind-address=127.0.0.1 --pid-file="$STATE/run/mariadbd.raw" --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
        --innodb-flush-log-at-trx-commit=0 </dev/null > "$STATE/log/mariadbd.log" 2>&1 & )
    local i p; for ((i = 0; i < 300; i++)); do mariadb --no-defaults -uroot -S "$d/s" -e 'select 1' >/dev/null 2>&1 && break; sleep 0.1; done
    p=$(cat "$STATE/run/mariadbd.raw") || die "mariadbd did not start"; [ "$MODE" = netns ] && p=$(to_host_pid login "$p")
    record mariadbd "$p"
    mariadb --no-defaults -uroot -S "$d/s" -e "create database if not exists slurm_acct;
      create user if not exists 'slurm'@'127.0.0.1' identified by 'slurm'; create user if not exists 'slurm'@'localhost' identified by 'slurm';
      grant all on slurm_acct.* to 'slurm'@'127.0.0.1'; grant all on slurm_acct.* to 'slurm'@'localhost';" || die "mariadb grants"
  fi
  daemon slurmdbd login slurmdbd
  local i; for ((i = 0; i < 100; i++)); do sacctmgr_ping && return 0; sleep 0.2; done; die "slurmdbd does not answer"
}
client() { if [ "$MODE" = netns ]; then in_ns login "$@"; else SLURM_CONF="$STATE/etc/slurm.conf" "$@"; fi; }
sacctmgr_ping() { client sacctmgr -n show cluster >/dev/null 2>&1; }

cmd_up() {
  mkdir -p "$STATE"/{etc,run,log,ctld,munge,dev,spool} || die "cannot make $STATE"
  chmod 755 "$STATE" "$STATE"/{etc,run,log,munge,dev}
  load_mode; install_pkgs
  [ "$MODE" = auto ] && { if probe_netns; then MODE=netns; else MODE=plain; fi; }
  if [ ! -f "$STATE/settings" ]; then
    for v in MODE N CPUS MEM GPUS DBD CGROUP CRED NDT; do echo "$v=${!v}"; done > "$STATE/settings"
    write_config
  fi
  local n i=0 p
  for n in $(nodes); do mkdir -p "$STATE/spool/$n"; done
  if [ "$MODE" = netns ]; then
    boot login; p=$(init_pid login)
    nsenter -t "$p" -n ip link show br0 >/dev/null 2>&1 || {
      nsenter -t "$p" -n ip link add br0 type bridge; nsenter -t "$p" -n ip addr add "$NET.254/24" dev br0
      nsenter -t "$p" -n ip link set br0 up; }
  elif ! grep -q '# local-slurm$' /etc/hosts; then
    for n in $(nodes); do echo "127.0.0.1 $n # local-slurm" >> /etc/hosts; done
  fi
  [ -s "$STATE/munge/key" ] || { ( umask 077; head -c 128 /dev/urandom > "$STATE/munge/key" ); chmod 400 "$STATE/munge/key"; }
  daemon munged login munged --force --key-file="$STATE/munge/key" --socket="$STATE/munge/sock" --num-threads=2 \
    --pid-file="$STATE/run/munged.raw" --log-file="$STATE/munge/log" --seed-file="$STATE/munge/seed"
  start_dbd
  daemon slurmctld login slurmctld
  for n in $(nodes); do i=$((i + 1)); boot "$n"; wire "$n" $i; daemon "slurmd-$n" "$n" slurmd -N "$n"; done
  local ok
  for ((i = 0; i < 120; i++)); do
    ok=$(client sinfo -h -N -p main -o '%T' 2>/dev/null | grep -cE '^(idle|allocated|mixed|completing)$')
    [ "$ok" = "$N" ] && { say "up: mode=$MODE nodes=$N state=$STATE"; return 0; }
    # a node that went DOWN comes back when its slurmd registers (ReturnToService=2); one drained by hand does not
    [ $i = 6 ] && for n in $(nodes); do client scontrol update NodeName="$n" State=RESUME >/dev/null 2>&1; done
    sleep 0.5
  done
  client sinfo -N -l >&2; die "nodes did not become idle in 60 s; see $STATE/log"
}

cmd_down() {
  load_mode; [ -d "$STATE/run" ] || return 0
  local f n
  if [ "$MODE" = plain ]; then  # netns: killing PID 1 takes the whole machine with it
    for f in "$STATE"/run/slurmd-*.pid; do [ -e "$f" ] || continue; n=$(basename "$f" .pid); kill_steps "${n#slurmd-}"; slay "$n"; done
    sed '/# local-slurm$/d' /etc/hosts > "$STATE/hosts.new" && cat "$STATE/hosts.new" > /etc/hosts   # no rename: may be a bind mount
  fi
  for n in slurmctld slurmdbd mariadbd; do slay "$n"; done        # state is saved on SIGTERM
  for f in "$STATE/run/machine-$PFX"*.pid; do [ -e "$f" ] && slay "$(basename "$f" .pid)" KILL; done
  slay munged; slay machine-login KILL
  rm -f "$STATE"/run/*.pid "$STATE"/run/*.raw "$STATE"/run/*.ready
  [ "$CGROUP" = 1 ] && for n in $(nodes); do
    find /sys/fs/cgroup -mindepth 2 -depth -type d -path "*/slurm_$n*" -exec rmdir {} + 2>/dev/null; done
  say "down"
}
kill_steps() { # plain mode: job steps of NODE: slurmstepd with this node's log open, and descendants
  local p c; for p in $(step_pids "$1"); do for c in $(descendants "$p"); do kill -9 "$c" 2>/dev/null; done; kill -9 "$p" 2>/dev/null; done; return 0; }
step_pids() { local d; for d in /proc/[0-9]*; do
    case $(tr '\0' ' ' 2>/dev/null < "$d/cmdline") in slurmstepd:*) ;; *) continue;; esac
    ls -l "$d/fd" 2>/dev/null | grep -q "$STATE/log/slurmd-$1.log" && echo "${d#/proc/}"; done; }
descendants() { local c; for c in $(ps -o pid= --ppid "$1"); do descendants "$c"; echo "$c"; done; }

cmd_status() {
  load_mode; [ -f "$STATE/settings" ] || { echo "no cluster in $STATE"; return 3; }
  local f rc=0; echo "mode=$MODE nodes=$N state=$STATE"
  for f in munged slurmctld $( [ "$DBD" = 1 ] && echo mariadbd slurmdbd ) $(nodes | sed 's/^/slurmd-/'); do
    printf '  %-18s %s\n' "$f" "$(pid_of "$f" || { echo dead; })"; pid_of "$f" >/dev/null || rc=1; done
  [ $rc = 0 ] || echo "  (run 'up' to restart what is dead)"
  pid_of slurmctld >/dev/null && { client sinfo -N -l; client squeue -a -o '%.7i %.9P %.12j %.8u %.9T %.8M %.5D %R'; }
  return $rc
}
cmd_exec() { load_mode; local n=login; [ "${1:-}" = -n ] && { n=$2; shift 2; }
  if [ "$MODE" = netns ]; then local p; p=$(init_pid "$n") || die "machine $n is down"; exec nsenter -t "$p" "${NS[@]}" --wdns="$PWD" -- "$@"
  else SLURM_CONF=$STATE/etc/slurm.conf exec "$@"; fi; }
cmd_crash() { load_mode
  if [ "$MODE" = netns ]; then slay "machine-$1" KILL; rm -f "$STATE/run/slurmd-$1".*; else slay "slurmd-$1" KILL; kill_steps "$1"; fi; }
cmd_killd() { load_mode; slay "slurmd-$1" KILL; }

c=${1:-}; [ $# -gt 0 ] && shift
case $c in
  install) mkdir -p "$STATE/log"; install_pkgs ;;
  up) cmd_up ;; down) cmd_down ;; purge) cmd_down; case $STATE in /|"") ;; *) rm -rf "$STATE" ;; esac ;;
  status) cmd_status ;; exec) cmd_exec "$@" ;; crash) cmd_crash "$1" ;; killd) cmd_killd "$1" ;;
  *) sed -n '2,11p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
