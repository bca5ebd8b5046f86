package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// A process is one that runs as long as the cluster does.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{} // closed when it ended
	err  error         // why, once done
}

// start runs a program with its output in logs/name.log. An end before the cluster's is reported by died.
func start(logs, name string, env []string, argv ...string) (*process, error) {
	log, err := os.Create(filepath.Join(logs, name+".log"))
	if err != nil {
		return nil, fmt.Errorf("e2e: %w", err)
	}
	defer log.Close()
	p := &process{name: name, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("e2e: start %s: %w", name, err)
	}
	go p.wait()
	return p, nil
}

func (p *process) wait() {
	p.err = p.cmd.Wait()
	close(p.done)
}

// died is nil while the process lives.
func (p *process) died() error {
	select {
	case <-p.done:
		return &hopeless{fmt.Errorf("e2e: %s ended: %v; see its log", p.name, p.err)}
	default:
		return nil
	}
}
