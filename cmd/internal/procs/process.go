package procs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// What is read of one file of /proc, at most.
const (
	maxCgroup = 64 << 10
	maxStat   = 4 << 10
)

// A process is one entry of /proc. Everything is read below one open
// directory, which the kernel ties to the process: once it has ended nothing
// can be read, whoever gets its PID.
type process struct {
	pid    int
	dir    int
	ns     nsID
	cgroup cgroup
}

// listPIDs returns those that are there now.
func listPIDs(proc string) ([]int, error) {
	d, err := os.Open(proc)
	if err != nil {
		return nil, fmt.Errorf("procs: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("procs: list %s: %w", proc, err)
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// openProcess finds out which network namespace a process is in.
func openProcess(proc string, pid int) (*process, error) {
	p, err := openDir(proc, pid)
	if err != nil {
		return nil, err
	}
	if p.ns, err = identifyPath(p.dir, "ns/net"); err != nil {
		p.close()
		return nil, fmt.Errorf("procs: namespace of process %d: %w", pid, err)
	}
	return p, nil
}

func openDir(proc string, pid int) (*process, error) {
	path := fmt.Sprintf("%s/%d", proc, pid)
	dir, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("procs: open %s: %w", path, err)
	}
	return &process{pid: pid, dir: dir}, nil
}

func (p *process) close() { _ = unix.Close(p.dir) }

// read returns what a file of the process has, up to limit bytes; a longer one
// is an error.
func (p *process) read(name string, limit int) ([]byte, error) {
	fd, err := unix.Openat(p.dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("procs: %s of process %d: %w", name, p.pid, err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, fmt.Errorf("procs: %s of process %d: %w", name, p.pid, err)
	}
	if len(b) > limit {
		return nil, fmt.Errorf("procs: %s of process %d has more than %d bytes", name, p.pid, limit)
	}
	return b, nil
}

func (p *process) readCgroup() error {
	b, err := p.read("cgroup", maxCgroup)
	if err != nil {
		return err
	}
	p.cgroup, err = parseCgroup(string(b))
	return err
}

// stat returns the name of the process and when it started.
func (p *process) stat() (stat, error) {
	b, err := p.read("stat", maxStat)
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// claim notes the process as one of its namespace, unless an older one is.
func (p *process) claim(list map[nsID]claim) error {
	st, err := p.stat()
	if err != nil {
		return nil // It has ended.
	}
	known, ok := list[p.ns]
	if ok && known.started <= st.started {
		return nil
	}
	if !ok {
		fd, err := unix.Openat(p.dir, "ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			if isGone(err) {
				return nil
			}
			return fmt.Errorf("procs: open namespace of process %d: %w", p.pid, err)
		}
		known.file = os.NewFile(uintptr(fd), fmt.Sprintf("network namespace of process %d", p.pid))
		if id, err := identify(known.file); err != nil || id != p.ns {
			_ = known.file.Close()
			return err // The process has gone elsewhere in between.
		}
	}
	known.started = st.started
	list[p.ns] = known
	return nil
}

// stat is what is used of /proc/PID/stat.
type stat struct {
	name    string
	started uint64 // Clock ticks since the host started.
}

var errStat = errors.New("procs: stat is not as proc_pid_stat(5) says")

// parseStat reads /proc/PID/stat. The name may hold anything, parentheses and
// blanks too; no field after it does.
func parseStat(b []byte) (stat, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return stat{}, errStat
	}
	const startTime = 22 // "(22) starttime"; the state, (3), is the first behind the name
	fields := bytes.Fields(b[end+1:])
	if len(fields) <= startTime-3 {
		return stat{}, errStat
	}
	started, err := strconv.ParseUint(string(fields[startTime-3]), 10, 64)
	if err != nil {
		return stat{}, errStat
	}
	return stat{name: string(b[open+1 : end]), started: started}, nil
}
