// Package demo shows a mesh of two nodes on this machine and checks every
// claim it makes: each is a line that begins with ok or FAIL.
package demo

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/ztun/ztun/cmd/internal/lab"
)

//go:embed mesh.yaml
var mesh string

// Options say how the demo runs.
type Options struct {
	// Name of the lab. Empty: "demo".
	Name string
	// Program and Proxy as in lab.Options.
	Program, Proxy string
	// Out takes the lines. Required.
	Out io.Writer
}

// ErrFailed says that a line began with FAIL.
var ErrFailed = errors.New("demo: not every line holds")

// A demo is one run.
type demo struct {
	lab     *lab.Lab
	program string
	out     io.Writer
	began   time.Time
	checked int
	failed  int
}

// Run runs the demo, takes its lab down, and returns ErrFailed unless every
// line holds. The lab dies with the calling process, however that ends.
func Run(ctx context.Context, o Options) (err error) {
	d := &demo{out: o.Out, program: "ztun", began: time.Now()}
	if o.Name == "" {
		o.Name = "demo"
	}
	d.step("starting two nodes, five pods and a control plane")
	d.lab, err = lab.Start(ctx, lab.Options{
		Name: o.Name, Files: map[string]string{"mesh.yaml": mesh}, Program: o.Program, Proxy: o.Proxy,
		Progress: indented{o.Out}, Attached: true,
	})
	if err != nil {
		return err
	}
	defer func() {
		limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if downErr := d.lab.Down(limited); downErr != nil {
			err = errors.Join(err, downErr)
		}
	}()
	if err := d.scenes(ctx); err != nil {
		d.explain(ctx)
		return err
	}
	if ctx.Err() != nil {
		return fmt.Errorf("demo: %w", context.Cause(ctx))
	}
	if d.failed > 0 {
		d.explain(ctx)
		fmt.Fprintf(d.out, "\n%d of %d lines do not hold\n", d.failed, d.checked)
		return ErrFailed
	}
	fmt.Fprintf(d.out, "\nall %d lines hold, %.1f s\n", d.checked, time.Since(d.began).Seconds())
	return nil
}

// step says what happens next.
func (d *demo) step(format string, args ...any) {
	fmt.Fprintf(d.out, "%5.1fs  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

// check prints a claim, and what contradicts it if it does not hold.
func (d *demo) check(holds bool, claim string, found ...any) {
	d.checked++
	if holds {
		fmt.Fprintf(d.out, "   ok   %s\n", claim)
		return
	}
	d.failed++
	fmt.Fprintf(d.out, "   FAIL %s\n        found: %s\n", claim, strings.TrimSpace(fmt.Sprintln(found...)))
}

// explain prints the ends of the logs.
func (d *demo) explain(ctx context.Context) {
	for _, process := range []string{"control", "proxy/node-a", "attach/node-a", "proxy/node-b", "attach/node-b"} {
		text, err := d.logs(ctx, process)
		if err != nil {
			return
		}
		lines := strings.Split(strings.TrimSpace(text), "\n")
		lines = lines[max(0, len(lines)-25):]
		fmt.Fprintf(d.out, "\nlast of %s:\n  %s\n", process, strings.Join(lines, "\n  "))
	}
}

// An answer is what a command in a pod said and how it ended.
type answer struct {
	out, err string
	code     int
}

func (a answer) String() string {
	return strings.TrimSpace(fmt.Sprintf("exit code %d %s %s", a.code, strings.TrimSpace(a.out), strings.TrimSpace(a.err)))
}

// field returns the value of a "name: value" line.
func (a answer) field(name string) string {
	for line := range strings.Lines(a.out) {
		if value, ok := strings.CutPrefix(line, name+": "); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// run runs the lab's own program in a pod.
func (d *demo) run(ctx context.Context, pod string, args ...string) (answer, error) {
	var a answer
	var code int
	var err error
	a.out, a.err, err = capture(func(out, errOut *os.File) error {
		var execErr error
		code, execErr = d.lab.Exec(ctx, pod, append([]string{d.program, "lab"}, args...), lab.Stdio{Out: out, Err: errOut})
		return execErr
	})
	a.code = code
	if err != nil {
		return a, fmt.Errorf("demo: in %s: %w", pod, err)
	}
	return a, nil
}

// call calls a URL from a pod.
func (d *demo) call(ctx context.Context, pod, url string, args ...string) (answer, error) {
	return d.run(ctx, pod, append([]string{"call", url, "--timeout", "3s"}, args...)...)
}

// logs returns what a process has said.
func (d *demo) logs(ctx context.Context, process string) (string, error) {
	out, _, err := capture(func(out, _ *os.File) error { return d.lab.Logs(ctx, process, false, out) })
	return out, err
}

// capture collects what f writes to two files.
func capture(f func(out, errOut *os.File) error) (out, errOut string, err error) {
	type end struct {
		write *os.File
		text  chan string
	}
	var ends [2]end
	for i := range ends {
		r, w, err := os.Pipe()
		if err != nil {
			return "", "", fmt.Errorf("demo: %w", err)
		}
		ends[i] = end{w, make(chan string, 1)}
		go func() {
			defer r.Close()
			var b bytes.Buffer
			io.Copy(&b, r)
			ends[i].text <- b.String()
		}()
	}
	err = f(ends[0].write, ends[1].write)
	ends[0].write.Close()
	ends[1].write.Close()
	return <-ends[0].text, <-ends[1].text, err
}

// An indented writer puts the lab's progress below the demo's own steps.
type indented struct{ w io.Writer }

func (i indented) Write(p []byte) (int, error) {
	if _, err := fmt.Fprintf(i.w, "        %s", p); err != nil {
		return 0, err
	}
	return len(p), nil
}
