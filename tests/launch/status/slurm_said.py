"""What a real Slurm 22.05 said of six jobs: captured from a two-node cluster, nothing changed but its folder.

1 trains on two nodes, was requeued once by hand, and has a name that looks like other fields; 2 fails with 3; 3 depends
on 2; 4 depends on 1; 5 is an array of four, of which task 1 fails, two at a time; 6 waits for both nodes.
"""

# ruff: noqa: E501

SQUEUE_EARLY = """\
3|CANCELLED|DependencyNeverSatisfied|1||2026-11-22T20:26:51|2026-11-22T20:26:51|5:00|5:00|afterok:2(failed)|eval
2|FAILED|NonZeroExitCode|1|node1|2026-11-22T20:26:50|2026-11-22T20:26:50|5:00|5:00|(null)|fails
4|PENDING|Dependency|1||N/A|N/A|5:00|5:00|afterok:1(unfulfilled)|export
5_[2-3%2]|PENDING|JobArrayTaskLimit|1||N/A|N/A|5:00|5:00|(null)|build
6|PENDING|Resources|2||2026-11-22T20:36:50|2026-11-22T20:41:50|5:00|5:00|(null)|waits
1|RUNNING|None|2|node[1-2]|2026-11-22T20:26:50|2026-11-22T20:36:50|9:57|10:00|(null)|a|b JobState=X
5_0|RUNNING|None|1|node1|2026-11-22T20:26:50|2026-11-22T20:31:50|4:57|5:00|(null)|build
5_1|RUNNING|None|1|node1|2026-11-22T20:26:50|2026-11-22T20:31:50|4:57|5:00|(null)|build
"""
SQUEUE_LATE = """\
3|CANCELLED|DependencyNeverSatisfied|1||2026-11-22T20:26:51|2026-11-22T20:26:51|5:00|5:00|afterok:2(failed)|eval
5_2|COMPLETED|None|1|node1|2026-11-22T20:27:02|2026-11-22T20:27:14|4:48|5:00|(null)|build
5_3|COMPLETED|None|1|node1|2026-11-22T20:27:02|2026-11-22T20:27:14|4:48|5:00|(null)|build
5_0|COMPLETED|None|1|node1|2026-11-22T20:26:50|2026-11-22T20:27:02|4:48|5:00|(null)|build
2|FAILED|NonZeroExitCode|1|node1|2026-11-22T20:26:50|2026-11-22T20:26:50|5:00|5:00|(null)|fails
5_1|FAILED|NonZeroExitCode|1|node1|2026-11-22T20:26:50|2026-11-22T20:27:02|4:48|5:00|(null)|build
4|PENDING|Dependency|1||N/A|N/A|5:00|5:00|afterok:1(unfulfilled)|export
6|PENDING|Resources|2||2026-11-22T20:37:02|2026-11-22T20:42:02|5:00|5:00|(null)|waits
1|RUNNING|None|2|node[1-2]|2026-11-22T20:27:02|2026-11-22T20:37:02|9:39|10:00|(null)|a|b JobState=X
"""
SQUEUE_END = """\
1|CANCELLED|None|2|node[1-2]|2026-11-22T20:27:02|2026-11-22T20:27:23|9:39|10:00|(null)|a|b JobState=X
3|CANCELLED|DependencyNeverSatisfied|1||2026-11-22T20:26:51|2026-11-22T20:26:51|5:00|5:00|afterok:2(failed)|eval
4|CANCELLED|DependencyNeverSatisfied|1||2026-11-22T20:27:23|2026-11-22T20:27:23|5:00|5:00|afterok:1(failed)|export
5_2|COMPLETED|None|1|node1|2026-11-22T20:27:02|2026-11-22T20:27:14|4:48|5:00|(null)|build
5_3|COMPLETED|None|1|node1|2026-11-22T20:27:02|2026-11-22T20:27:14|4:48|5:00|(null)|build
5_0|COMPLETED|None|1|node1|2026-11-22T20:26:50|2026-11-22T20:27:02|4:48|5:00|(null)|build
6|COMPLETED|None|2|node[1-2]|2026-11-22T20:27:23|2026-11-22T20:27:24|4:59|5:00|(null)|waits
2|FAILED|NonZeroExitCode|1|node1|2026-11-22T20:26:50|2026-11-22T20:26:50|5:00|5:00|(null)|fails
5_1|FAILED|NonZeroExitCode|1|node1|2026-11-22T20:26:50|2026-11-22T20:27:02|4:48|5:00|(null)|build
"""
SACCT_END = """\
2|FAILED|3:0|1|node1|2026-11-22T20:26:50|2026-11-22T20:26:50|00:05:00|fails
3|CANCELLED|0:0|1|None assigned|2026-11-22T20:26:51|2026-11-22T20:26:51|00:05:00|eval
4|CANCELLED|0:0|1|None assigned|None|2026-11-22T20:27:23|00:05:00|export
6|COMPLETED|0:0|2|node[1-2]|2026-11-22T20:27:23|2026-11-22T20:27:24|00:05:00|waits
5_0|COMPLETED|0:0|1|node1|2026-11-22T20:26:50|2026-11-22T20:27:02|00:05:00|build
5_1|FAILED|1:0|1|node1|2026-11-22T20:26:50|2026-11-22T20:27:02|00:05:00|build
5_2|COMPLETED|0:0|1|node1|2026-11-22T20:27:02|2026-11-22T20:27:14|00:05:00|build
5_3|COMPLETED|0:0|1|node1|2026-11-22T20:27:02|2026-11-22T20:27:14|00:05:00|build
1|CANCELLED by 0|0:0|2|node[1-2]|2026-11-22T20:27:02|2026-11-22T20:27:23|00:10:00|a|b JobState=X
"""
SCONTROL_REQUEUED = """\
JobId=1 JobName=a|b JobState=X UserId=root(0) GroupId=root(0) MCS_label=N/A Priority=4294901759 Nice=0 Account=root QOS=normal JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:00 TimeLimit=00:10:00 TimeMin=N/A SubmitTime=2026-11-22T20:26:54 EligibleTime=2026-11-22T20:27:00 AccrueTime=2026-11-22T20:27:00 StartTime=2026-11-22T20:27:00 EndTime=2026-11-22T20:37:00 Deadline=N/A SuspendTime=None SecsPreSuspend=0 LastSchedEval=2026-11-22T20:26:50 Scheduler=Main Partition=main AllocNode:Sid=login:0 ReqNodeList=(null) ExcNodeList=(null) NodeList= NumNodes=2 NumCPUs=2 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=2,mem=2000M,node=2,billing=2 Socks/Node=* NtasksPerN:B:S:C=1:0:*:* CoreSpec=* MinCPUsNode=1 MinMemoryCPU=1000M MinTmpDiskNode=0 Features=(null) DelayBoot=00:00:00 OverSubscribe=OK Contiguous=0 Licenses=(null) Network=(null) Command=/home/me/work/job.sh conf/x.yaml --set a=b c WorkDir=/home/me/work StdErr=/home/me/work/slurm-1.out StdIn=/dev/null StdOut=/home/me/work/slurm-1.out Power=
"""
