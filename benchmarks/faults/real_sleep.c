/* Sleeps of the system's own, for LD_PRELOAD before libfaketime: 0.9.10 takes the deadline of a monotonic sleep (Python
 * 3.11's time.sleep) for one of the moved clock, and where that was moved back the sleep fails with EINVAL. */
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
}
