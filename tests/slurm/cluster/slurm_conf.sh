# Prints the slurm.conf of a private cluster; up.sh and namespaces.sh give the parts that differ:
#   slurm_conf "<SlurmctldHost>" "<more lines>"
slurm_conf() {
    local me; me=$(id -un)
    cat <<CONF
ClusterName=test
SlurmctldHost=$1
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation=$CLUSTER/ctld
SlurmdSpoolDir=$CLUSTER/spool.%n
SlurmctldPidFile=$CLUSTER/pid/slurmctld
SlurmdPidFile=$CLUSTER/pid/slurmd.%n
SlurmctldLogFile=$CLUSTER/log/slurmctld.log
SlurmdLogFile=$CLUSTER/log/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TmpFS=$CLUSTER/tmp.%n
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
MpiDefault=none
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=300
JobRequeue=1
PropagateResourceLimits=NONE
$2
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=120 State=UP
PartitionName=urgent Nodes=n[1-4] MaxTime=INFINITE DefaultTime=60 PriorityTier=9 PreemptMode=OFF State=UP
CONF
}
