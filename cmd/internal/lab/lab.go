// Package lab runs a mesh on this machine: nodes and pods are network
// namespaces joined by bridges, a pod's containers are processes, and each
// node has its own ztun-proxy and its own attach side, as in a cluster.
//
// Everything lives in PID, mount and network namespaces of its own, and in a
// user namespace too when the caller is not root. One process is PID 1 in
// there. When it dies, however it dies, the kernel takes everything down with
// it: processes, interfaces, mounts and files. Nothing is written outside.
//
//	l, err := lab.Start(ctx, lab.Options{Dir: "deploy/examples/hello", Progress: os.Stderr})
//	code, err := l.Exec(ctx, "default/client", []string{"ztun", "lab", "call", "http://server"}, stdio)
//	err = l.Down(ctx)
//
// The processes of a lab, from the outside in:
//
//	ztun lab up            makes the namespaces, hands over the control socket, leaves
//	  ztun lab init        PID 1: reaps, and dies with the one below
//	    ztun lab supervise network, processes, control socket: type supervisor
//	      ztun control     the mesh's control plane
//	      ztun lab attach  one a node: the privileged half (package agent)
//	      ztun-proxy       one a node
//	      containers       each entered through ztun lab container
//
// The control socket has an abstract address, so that it goes with the lab;
// only the user who started the lab is answered.
package lab

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// DefaultName is the lab that commands mean when none is named.
const DefaultName = "default"

// Options say which lab to start. The zero value of a field is the default
// named on it.
type Options struct {
	// Name tells labs of one user apart. Empty: DefaultName.
	Name string
	// Dir holds the Kubernetes and Istio YAML that describes the lab.
	Dir string
	// Files are used instead of a Dir: YAML by file name, at most 64 KiB.
	Files map[string]string
	// Program is the ztun executable that runs the lab's processes. Empty:
	// this one.
	Program string
	// Proxy is the ztun-proxy executable. Empty: the one beside Program.
	Proxy string
	// Nodes are those that run other programs than ztun's, by name.
	Nodes map[string]NodePrograms
	// Progress takes a line for each step. Nil: none.
	Progress io.Writer
	// Attached makes the lab die with the caller's process.
	Attached bool
}

// NodePrograms are what a node runs in the place of ztun-proxy and `ztun lab
// attach`, in its network namespace and as the lab's root.
type NodePrograms struct {
	// Proxy is a command line for the shell, which env(1) is put before, so
	// that it may begin with NAME=VALUE. Its environment is that of a stock
	// ztunnel.
	Proxy string `json:"proxy"`
	// Attach is a program with its arguments; the order comes as the last
	// one, and RunAttach is what obeys it.
	Attach []string `json:"attach"`
}

var validName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$`)

// complete fills in the defaults and checks what the caller gave.
func (o *Options) complete() error {
	if o.Name == "" {
		o.Name = DefaultName
	}
	if !validName.MatchString(o.Name) {
		return fmt.Errorf("lab: name %q: want lower case letters, digits and dashes, at most 32", o.Name)
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	if o.Program == "" {
		self, err := os.Executable()
		if err != nil {
			return fmt.Errorf("lab: find own executable: %w", err)
		}
		o.Program = self
	}
	if o.Proxy == "" {
		o.Proxy = filepath.Join(filepath.Dir(o.Program), "ztun-proxy")
	}
	if _, err := os.Stat(o.Proxy); err != nil {
		return fmt.Errorf("lab: ztun-proxy is not beside ztun (run make build): %w", err)
	}
	if o.Files != nil {
		return nil
	}
	return o.checkDir()
}

// checkDir makes sure that Dir can be read, by its absolute name.
func (o *Options) checkDir() error {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return fmt.Errorf("lab: directory %s: %w", o.Dir, err)
	}
	o.Dir = dir
	info, err := os.Stat(dir)
	switch {
	case err != nil:
		return fmt.Errorf("lab: %w", err)
	case !info.IsDir():
		return fmt.Errorf("lab: %s: not a directory", dir)
	case strings.HasPrefix(dir+"/", runtimeMount+"/"):
		return fmt.Errorf("lab: %s: the lab mounts its own files on %s; put the directory elsewhere", dir, runtimeMount)
	}
	return nil
}

// socketAddress is the abstract address of a lab's control socket.
func socketAddress(name string) string {
	return fmt.Sprintf("@ztun-lab/%d/%s", os.Getuid(), name)
}
