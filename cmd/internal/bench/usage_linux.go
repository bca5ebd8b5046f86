package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what a process has used.
type usage struct {
	CPU     time.Duration `json:"cpu"` // Of all its threads, also those that have ended.
	RSS     uint64        `json:"rss"` // In bytes.
	Threads int           `json:"threads"`
}

// measureUsage looks at processes of this PID namespace, and at the machine.
func measureUsage(o order) (answer, error) {
	var a answer
	pids := o.PIDs
	for _, pid := range pids {
		cpu, err := cpuTime(pid)
		if err != nil {
			return answer{}, fmt.Errorf("bench: CPU of process %d: %w", pid, err)
		}
		rss, err := residentSize(pid)
		if err != nil {
			return answer{}, fmt.Errorf("bench: memory of process %d: %w", pid, err)
		}
		threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return answer{}, fmt.Errorf("bench: threads of process %d: %w", pid, err)
		}
		a.Usage = append(a.Usage, usage{CPU: cpu, RSS: rss, Threads: len(threads)})
	}
	if !o.Machine {
		return a, nil
	}
	ours, err := privateMemory()
	if err != nil {
		return answer{}, fmt.Errorf("bench: memory of the lab: %w", err)
	}
	kernel, err := kernelMemory()
	if err != nil {
		return answer{}, fmt.Errorf("bench: memory of the kernel: %w", err)
	}
	a.Memory = ours + kernel
	return a, nil
}

// A clock is the CPU time of each process that there is, kernel threads
// included, by pid. /proc/stat would be quicker, but where it counts by ticks,
// work of less than a tick that a timer began is counted wrong by any factor.
type clock map[int]time.Duration

func readClock() (clock, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("bench: CPU of the machine: %w", err)
	}
	c := clock{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		t, err := cpuTime(pid)
		if errors.Is(err, unix.EINVAL) {
			continue // It has just ended.
		}
		if err != nil {
			return nil, fmt.Errorf("bench: CPU of process %d: %w", pid, err)
		}
		c[pid] = t
	}
	return c, nil
}

// since is what all processes used after before was read. What one used that has
// ended meanwhile is not known, and not counted.
func (c clock) since(before clock) (sum time.Duration) {
	for pid, t := range c {
		if earlier := before[pid]; earlier <= t {
			t -= earlier
		} // Else the pid is another process's now.
		sum += t
	}
	return sum
}

// kernelMemory is what the kernel itself uses: sockets and all that belongs
// to them are in its slabs. MemAvailable would say less: it moves by 100 MiB
// and more with what other programs do, and with the free pages that each CPU
// keeps at hand.
func kernelMemory() (uint64, error) {
	var sum uint64
	for _, name := range []string{"Slab:", "KernelStack:", "PageTables:", "Percpu:"} {
		n, err := fieldKiB("/proc/meminfo", name)
		if err != nil && !errors.Is(err, errNoField) {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// privateMemory sums what all processes of this PID namespace, a lab's, have
// to themselves.
func privateMemory() (uint64, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	var sum uint64
	for _, e := range entries {
		if _, err := strconv.Atoi(e.Name()); err != nil {
			continue
		}
		n, err := fieldKiB("/proc/"+e.Name()+"/smaps_rollup", "Anonymous:")
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ESRCH) {
			n, err = fieldKiB("/proc/"+e.Name()+"/status", "RssAnon:")
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, errNoField) {
			continue // It has just ended.
		}
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// cpuTime reads a process's CPU clock, which is good to nanoseconds where
// /proc/PID/stat is good to ticks of 10 ms.
func cpuTime(pid int) (time.Duration, error) {
	const schedClock = 2 // CPUCLOCK_SCHED of linux/posix-timers.h
	var t unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|schedClock, &t); err != nil {
		return 0, err
	}
	return time.Duration(t.Nano()), nil
}

// residentSize sums a process's mappings. The quick figure of
// /proc/PID/status may be off by some 100 KiB for each CPU.
func residentSize(pid int) (uint64, error) {
	n, err := fieldKiB(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Rss:")
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		return fieldKiB(fmt.Sprintf("/proc/%d/status", pid), "VmRSS:")
	}
	return n, err
}

// fieldKiB returns the field of that name, given in KiB, in bytes.
func fieldKiB(file, name string) (uint64, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		value, ok := strings.CutPrefix(lines.Text(), name)
		if !ok {
			continue
		}
		var n uint64
		if _, err := fmt.Sscanf(value, "%d kB", &n); err != nil {
			return 0, fmt.Errorf("%s: %s %w", file, name, err)
		}
		return n << 10, nil
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%s: %w %s", file, errNoField, name)
}

var errNoField = errors.New("no field")
