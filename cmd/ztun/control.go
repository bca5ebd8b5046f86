package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/ztun/ztun/xds/control"
)

// newControlCommand is "ztun control": the embedded control plane and its tools.
func newControlCommand() *cobra.Command {
	var f controlFlags
	cmd := &cobra.Command{
		Use:   "control --dir DIR --state DIR",
		Short: "Serve a mesh from a directory of Kubernetes and Istio YAML",
		Long: `Serve workloads, services, policies and certificates to the proxies of a mesh,
from a directory of ordinary Kubernetes and Istio YAML: Pod, Service, Namespace,
Node, ServiceAccount, AuthorizationPolicy, PeerAuthentication. Other kinds are
named and ignored.

The directory is used whole or not at all: while anything in it cannot be used,
each problem is named with file, line and field, and the last good state stays in
force. Changes are taken up as they are written.

A proxy presents a node token (ztun control token) and trusts root-cert.pem of
the state directory.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return f.serve(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	f.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.cfg.State, "state", "", "directory for the CA, the token key and root-cert.pem; made when missing")
	flags.StringVar(&f.listen, "listen", "127.0.0.1:15012", "address to listen on")
	flags.StringSliceVar(&f.cfg.Hosts, "host", nil, "further names and addresses of this server, for its certificate")
	flags.StringVar(&f.cfg.CACert, "ca-cert", "", "certificate of a CA made elsewhere (PEM, intermediates after it)")
	flags.StringVar(&f.cfg.CAKey, "ca-key", "", "key of that CA (PEM)")
	flags.StringVar(&f.cfg.CARoot, "ca-root", "", "roots of that CA (PEM), unless --ca-cert ends in one")
	flags.DurationVar(&f.cfg.Limits.CertTTL, "cert-ttl", 24*time.Hour, "longest validity of a workload's certificate, and the default")
	flags.StringVar(&f.logLevel, "log-level", "info", "debug, info, warn or error")
	must(cmd.MarkFlagRequired("dir"))
	must(cmd.MarkFlagRequired("state"))
	cmd.AddCommand(newControlCheckCommand(), newControlTokenCommand(), newControlRotateCommand())
	return cmd
}

// controlFlags are the flags that say what is served.
type controlFlags struct {
	cfg      control.Config
	ranges   []string
	listen   string
	logLevel string
}

// register adds the flags that serving and checking share.
func (f *controlFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	m := &f.cfg.Mesh
	flags.StringVar(&f.cfg.Dir, "dir", "", "directory of YAML")
	flags.StringVar(&m.TrustDomain, "trust-domain", "cluster.local", "trust domain of every identity")
	flags.StringVar(&m.ClusterDomain, "cluster-domain", "cluster.local", "domain that Service names end in")
	flags.StringVar(&m.ClusterID, "cluster-id", "Kubernetes", "name of the cluster in workload uids")
	flags.StringVar(&m.RootNamespace, "root-namespace", "istio-system", "namespace whose policies apply to the whole mesh")
	flags.StringVar(&m.Network, "network", "", "network of every pod (default: label topology.istio.io/network of the root namespace)")
	flags.StringSliceVar(&f.ranges, "service-range", []string{"10.96.0.0/16", "fd00:96::/112"}, "where Services without a clusterIP get one; the first range's family is the primary one")
	flags.StringSliceVar(&m.ExcludeNamespaces, "exclude-namespace", []string{"kube-system"}, "namespaces that are never enrolled")
}

func (f *controlFlags) complete() error {
	f.cfg.Mesh.ServiceRanges = []netip.Prefix{}
	for _, s := range f.ranges {
		r, err := netip.ParsePrefix(s)
		if err != nil {
			return fmt.Errorf("control: --service-range %q is no network", s)
		}
		f.cfg.Mesh.ServiceRanges = append(f.cfg.Mesh.ServiceRanges, r)
	}
	return nil
}

func (f *controlFlags) serve(ctx context.Context, out, logs io.Writer) error {
	if err := f.complete(); err != nil {
		return err
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return fmt.Errorf("control: --log-level %q is none of debug, info, warn, error", f.logLevel)
	}
	f.cfg.Log = slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: level}))
	f.cfg.OnLoad = func(r control.Report) { printReport(out, r) }
	// Bound before anything is printed: whoever waits for the first line can connect.
	l, err := net.Listen("tcp", f.listen)
	if err != nil {
		return fmt.Errorf("control: listen: %w", err)
	}
	srv, err := control.New(f.cfg)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	fmt.Fprintf(out, "listening on %v, roots in %s\n", l.Addr(), filepath.Join(f.cfg.State, "root-cert.pem"))
	return srv.Serve(ctx, l)
}

// printReport writes a line for the reading and one for each of its problems.
func printReport(out io.Writer, r control.Report) {
	fmt.Fprintf(out, "%s %s\n", r.At.Format(time.DateTime), r.Summary())
	for _, p := range r.Problems {
		fmt.Fprintf(out, "  %s\n", p)
	}
}

func newControlCheckCommand() *cobra.Command {
	var f controlFlags
	cmd := &cobra.Command{
		Use:   "check --dir DIR",
		Short: "Say what in a directory cannot be used",
		Long:  "Read a directory as the server would, name every problem with file, line and field,\nand exit with 1 if it cannot be used. Warnings do not count.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.complete(); err != nil {
				return err
			}
			_, r := control.Check(f.cfg)
			for _, p := range r.Problems {
				fmt.Fprintln(cmd.OutOrStdout(), p)
			}
			if !r.Used {
				return fmt.Errorf("control: %s cannot be used: %d problem(s)", f.cfg.Dir, len(r.Problems)-r.Warnings())
			}
			fmt.Fprintf(cmd.OutOrStdout(), "ok: %v, %d warning(s)\n", r.Counts, r.Warnings())
			return nil
		},
	}
	f.register(cmd)
	must(cmd.MarkFlagRequired("dir"))
	return cmd
}

func newControlTokenCommand() *cobra.Command {
	var state, node, out string
	var ttl time.Duration
	cmd := &cobra.Command{
		Use:   "token --node NAME --state DIR",
		Short: "Make the token that a node's proxy presents",
		Long: `Make a signed token for one node. It is a secret: whoever has it gets the
certificates of every pod on that node, until it expires. Write it to a file with
--out; a proxy reads that file again and again, so that it can be replaced.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			token, err := control.MintToken(state, node, ttl, time.Now())
			if err != nil {
				return err
			}
			if out != "" {
				return writeToken(out, token)
			}
			// A newline in the file would end up in a header, where none may be.
			end := ""
			if isTerminal(cmd.OutOrStdout()) {
				end = "\n"
			}
			_, err = fmt.Fprint(cmd.OutOrStdout(), token, end)
			return err
		},
	}
	cmd.Flags().StringVar(&state, "state", "", "state directory of the control plane")
	cmd.Flags().StringVar(&node, "node", "", "name of the node, as in spec.nodeName")
	cmd.Flags().DurationVar(&ttl, "ttl", 12*time.Hour, "how long the token is valid")
	cmd.Flags().StringVar(&out, "out", "", "file to write it to, with mode 0600 and at once")
	must(cmd.MarkFlagRequired("state"))
	must(cmd.MarkFlagRequired("node"))
	return cmd
}

// writeToken replaces a file at once, so that a reader finds a whole token.
func writeToken(file, token string) error {
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+".*")
	if err != nil {
		return fmt.Errorf("control: write the token: %w", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(token)
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), file)
	}
	if err != nil {
		return fmt.Errorf("control: write the token: %w", err)
	}
	return nil
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func newControlRotateCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Replace the root of the CA without cutting a connection",
		Long: `Replace the root of the CA in three steps, a certificate's lifetime apart:

  prepare   make a new root; every bundle now holds both
  switch    sign with the new root
  retire    drop the old root

Before switch, root-cert.pem of the state directory must have reached every proxy.
A step that comes too early is refused, unless forced. A running server notices.`,
	}
	steps := []struct {
		step  control.RotationStep
		short string
	}{
		{control.RotatePrepare, "Make a new root and add it to every bundle"},
		{control.RotateSwitch, "Sign with the new root"},
		{control.RotateRetire, "Drop the old root"},
	}
	for _, s := range steps {
		cmd.AddCommand(newControlRotateStep(s.step, s.short))
	}
	var state string
	status := &cobra.Command{
		Use:   "status --state DIR",
		Short: "Show the roots and what each does",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := control.RotationState(state, time.Now())
			fmt.Fprint(cmd.OutOrStdout(), text)
			return err
		},
	}
	status.Flags().StringVar(&state, "state", "", "state directory of the control plane")
	must(status.MarkFlagRequired("state"))
	cmd.AddCommand(status)
	return cmd
}

func newControlRotateStep(step control.RotationStep, short string) *cobra.Command {
	var state, trustDomain string
	var ttl time.Duration
	var force bool
	cmd := &cobra.Command{
		Use:   string(step) + " --state DIR",
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			now := time.Now()
			err := control.Rotate(state, trustDomain, step, ttl, force, now)
			if errors.Is(err, control.ErrTooEarly) {
				return fmt.Errorf("%w, or use --force and accept broken connections", err)
			}
			if err != nil {
				return err
			}
			text, err := control.RotationState(state, now)
			fmt.Fprint(cmd.OutOrStdout(), text)
			return err
		},
	}
	cmd.Flags().StringVar(&state, "state", "", "state directory of the control plane")
	cmd.Flags().StringVar(&trustDomain, "trust-domain", "cluster.local", "trust domain, for the name of a new root")
	cmd.Flags().DurationVar(&ttl, "cert-ttl", 24*time.Hour, "the server's --cert-ttl")
	cmd.Flags().BoolVar(&force, "force", false, "take the step however early it is")
	must(cmd.MarkFlagRequired("state"))
	return cmd
}

// must is for errors that only a typing error in this file can cause.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
